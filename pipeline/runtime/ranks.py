"""The processes that torchrun started together: their group, and small messages among them.

Small messages (counts, flags, file names) go over gloo on the CPU, so they never wait for a GPU;
tensors on GPUs go over NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pipeline.errors import DecantError, OtherRankError, ParamsError
from pipeline.runtime.device import pick_device
from pipeline.runtime.launch import Launch, launch

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """One process among those that work together, or alone if torchrun did not start it."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    grouped: bool = False  # whether there is a process group (torchrun may start a single rank)

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all ranks, added up in float64."""
        if not self.grouped:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return [float(value) for value in sums]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.sum(float(flag))[0] > 0

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in rank order, on all ranks."""
        values: list[Any] = [value] * self.world_size
        if self.grouped:
            dist.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], Value]) -> Value:
        """Run `work` on rank 0 only and return its result on all ranks.

        Raises:
            OtherRankError: on the other ranks, if `work` failed on rank 0.
        """
        if not self.grouped:
            return work()
        outcome: list[Any] = [None, None]
        failure = None
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (DecantError, OSError) as error:
                failure = error
                outcome[1] = getattr(error, "exit_code", 1)
        dist.broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise OtherRankError(outcome[1])
        return outcome[0]  # type: ignore[no-any-return]


_PATIENCE = timedelta(hours=2)
"""How long ranks wait for one of them. PyTorch's ten minutes are less than it takes rank 0 to hash
or copy a large model while the others wait; ranks that are gone are noticed at once."""

ALONE = Ranks(torch.device("cpu"))


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the process group of the ranks that torchrun started, and leave it when the block ends.

    Args:
        device: the device from params.yaml; `cuda` and `auto` take the GPU of this process's local
            rank.

    Raises:
        ParamsError: there are more processes than GPUs, or `device` names a single one.
        DecantError: another rank went away, so this one ends too.
    """
    here = launch()
    if here is None:
        yield Ranks(pick_device(device))
        return
    if device.startswith("cuda:"):
        raise ParamsError(
            f"device={device} names one GPU, and torchrun gives each process its own: set "
            "device=cuda"
        )
    own = pick_device(device)
    if own.type == "cuda":
        own = _own_gpu(here.local_rank)
    try:
        _join(here, own)
        yield Ranks(own, here.rank, here.ranks, grouped=True)
    except (RuntimeError, CheckpointException) as error:
        if not lost_touch(error):
            raise
        raise DecantError(
            "the connection to another rank broke, because it exited or its machine went down: "
            "read its output, and run the same command to continue"
        ) from None
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def _join(here: Launch, device: torch.device) -> None:
    """Open the process group.

    When torchrun restarts ranks (--max-restarts), it keeps its address store, which still holds the
    addresses of the ranks that are gone, so each attempt uses its own names. Across several
    machines, attempt counts can differ, so this is left to torchrun.
    """
    store, rank, count = next(rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"attempt_{here.attempt}", store),
        timeout=_PATIENCE,
        rank=rank,
        world_size=count,
    )


def _own_gpu(local_rank: int) -> torch.device:
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise ParamsError(
            f"local rank {local_rank} has no GPU, since this machine has {found}: give torchrun "
            f"--nproc-per-node {found} at most, or set device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def lost_touch(error: BaseException) -> bool:
    """Return whether a torch error says that a peer is gone; gloo has no error type for it."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return (
        isinstance(error, dist.DistError)
        or any(sign in str(error) for sign in ("gloo", "NCCL", "Connection"))
        or any(lost_touch(failure) for failure, _ in failures)
    )
