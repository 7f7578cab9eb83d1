"""What torchrun says of this process: its rank, and how many processes there are.

PyTorch is not imported here, so that a stage's --help need not wait for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A process among those that torchrun started together."""

    rank: int  # 0 to ranks - 1
    ranks: int
    local_rank: int  # among those on this machine: the number of its GPU
    attempt: int  # how often torchrun has started this machine's ranks again, if they are all


def launch() -> Launch | None:
    """What torchrun says of this process; None where it was started by hand."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    rank, ranks, local_rank = (int(os.environ[name]) for name in names[:3])
    attempt = 0
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return Launch(rank=rank, ranks=ranks, local_rank=local_rank, attempt=attempt)


def is_first_rank() -> bool:
    """Whether this process is the one that talks: rank 0, or the only one."""
    here = launch()
    return here is None or here.rank == 0
