"""The place of this process under torchrun: its rank, and the number of processes.

This module does not import PyTorch, so that a stage's --help does not wait for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One of the processes that torchrun started together."""

    rank: int  # 0 to ranks - 1
    ranks: int
    local_rank: int  # rank on this machine, which is the number of its GPU
    attempt: int  # number of times torchrun has restarted the ranks, if all are on this machine


def launch() -> Launch | None:
    """Read this process's place from torchrun's variables; None if it was started by hand."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    rank, ranks, local_rank = (int(os.environ[name]) for name in names[:3])
    attempt = 0
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return Launch(rank=rank, ranks=ranks, local_rank=local_rank, attempt=attempt)


def num_ranks() -> int:
    """Return the number of processes that torchrun started together; 1 if it started none."""
    here = launch()
    return 1 if here is None else here.ranks


def is_first_rank() -> bool:
    """Return whether this process prints the messages: it is rank 0, or the only process."""
    here = launch()
    return here is None or here.rank == 0
