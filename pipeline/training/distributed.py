"""Train one student in several processes, with PyTorch's own engines, started by torchrun.

    torchrun --nproc-per-node 4 stages/train.py

`train.batch_rows` counts the rows of a batch on all ranks together. Each rank takes its share, and
sums are divided once, by the tokens on all ranks, so a run gives the same losses, within rounding,
on any number of ranks. Gradients are SUMS over ranks; because both engines take means, the loss is
multiplied by the number of ranks before backward (`Ranks.world_size`).

ddp keeps the whole student, its gradients and optimizer state on each rank. fsdp shards all three
over the ranks and gathers one transformer block at a time (FSDP2: `fully_shard` per block, and once
around the rest, so that a tied embedding and head stay one parameter). Weights are gathered in
float32 and rounded by autocast, as on one rank, so both engines give the same losses. Autograd then
keeps the rounded copies until backward, unless `run.activation_checkpointing` is on; turn it on
with fsdp when memory is short.

Small messages between ranks (counts, flags, file names) go over gloo on the CPU, so they never wait
for a GPU; gradients and weights go over NCCL on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pipeline.config.train_params import RunParams
from pipeline.errors import DecantError, OtherRankError, ParamsError
from pipeline.runtime.device import pick_device, require_compiler
from pipeline.runtime.launch import Launch, launch

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """One process among those that train together, or alone if torchrun did not start it."""

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


ALONE = Ranks(torch.device("cpu"))


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the process group of the ranks that torchrun started, and leave it when the block ends.

    Args:
        device: the device from params.yaml; `cuda` and `auto` take the GPU of this process's local
            rank.

    Raises:
        ParamsError: there are more processes than GPUs.
        DecantError: another rank went away, so this one ends too.
    """
    here = launch()
    if here is None:
        yield Ranks(pick_device(device))
        return
    own = pick_device(device)
    if own.type == "cuda":
        own = _own_gpu(here.local_rank)
    try:
        _join(here, own)
        yield Ranks(own, here.rank, here.ranks, grouped=True)
    except (RuntimeError, CheckpointException) as error:
        if not _lost_touch(error):
            raise
        raise DecantError(
            "the connection to another rank broke, because it exited or its machine went down: "
            "read its output, and run the same command to continue from the newest checkpoint"
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


def _lost_touch(error: BaseException) -> bool:
    """Return whether a torch error says that a peer is gone; gloo has no error type for it."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return (
        isinstance(error, dist.DistError)
        or any(sign in str(error) for sign in ("gloo", "NCCL", "Connection"))
        or any(_lost_touch(failure) for failure, _ in failures)
    )


def parallelise(step: nn.Module, ranks: Ranks, params: RunParams) -> nn.Module:
    """Move a module to this rank's device and wrap it for parallel training; train the result.

    Parameters keep their names and their places in `step`. Blocks are changed in place: their
    forward is compiled if `compile` is set, and recomputed in backward instead of kept if
    `activation_checkpointing` is set.

    Args:
        step: a module with float32 parameters, the same on all ranks. Its forward must include the
            loss, so that the engines' hooks cover the head's weight too.
    """
    blocks = transformer_blocks(step)
    if params.compile:
        require_compiler(ranks.device)
    for block in blocks:
        forward: Any = torch.compile(block.forward) if params.compile else block.forward
        if params.activation_checkpointing:
            forward = partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward
    step.to(ranks.device)
    if not ranks.grouped:
        return step
    if params.parallel == "ddp":
        return DistributedDataParallel(step, gradient_as_bucket_view=True)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for module in (*blocks, step):
        fully_shard(module, mesh=mesh)
    return step


def transformer_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the modules of the longest ModuleList, which works for any architecture."""
    lists = [list(m) for m in module.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def local_gradients(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Keep gradients on their rank until the last micro-batch, so that ddp reduces once per step.

    fsdp reduces the gradients of every micro-batch. Otherwise they would not be sharded, and each
    rank would hold those of a whole student, which is what fsdp is meant to avoid.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn gradients and dropout off within the block; shard the parameters again afterwards."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()  # the root stays gathered after a forward without a backward
        model.train()


def clip_gradients(module: nn.Module, limit: float) -> float:
    """Scale gradients to a global norm of at most `limit`; return the norm before scaling.

    The norm covers all ranks and is the same on all of them. If any rank has a non-finite gradient,
    the norm is non-finite everywhere, so all ranks take or skip the step together.
    """
    norm: Any = nn.utils.clip_grad_norm_(module.parameters(), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def gather_parameters(module: nn.Module, ranks: Ranks) -> None:
    """Gather sharded parameters whole in CPU memory on rank 0, so that they can be saved.

    On the other ranks, the module cannot be used afterwards.
    """
    whole: dict[Tensor, nn.Parameter] = {}  # a tied parameter stays tied
    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if parameter not in whole:
                    tensor = parameter.full_tensor().detach()
                    kept = tensor.cpu() if ranks.rank == 0 else tensor.new_empty(0)
                    whole[parameter] = nn.Parameter(kept, parameter.requires_grad)
                setattr(owner, name, whole[parameter])
