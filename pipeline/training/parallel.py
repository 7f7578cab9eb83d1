"""Several processes that train one student: PyTorch's own engine, started by torchrun.

    torchrun --nproc-per-node 4 stages/train.py

`train.batch_rows` is the batch of all ranks together, each takes its share of its rows, and sums
are divided once, by the tokens of all ranks: so a run gives the same losses, within rounding, on
any number of ranks. Gradients are SUMS over ranks; both engines take means, so the loss is
multiplied by the number of ranks before backward (`Ranks.count`).

ddp keeps a whole student, gradient and optimizer state on each rank. fsdp shards all three over the
ranks and gathers one transformer block at a time (FSDP2: `fully_shard` per block, and once around
the rest, so that a tied embedding and head stay one parameter). Weights are gathered in float32 and
rounded by autocast, as on one rank, so the two give the same losses. Autograd then keeps the
rounded copies until backward, unless `run.activation_checkpointing` is on, which belongs to fsdp
where memory is short.

Words between ranks (counts, flags, names of files) go over gloo on the CPU, so they never wait for
a GPU; gradients and weights go over NCCL on CUDA.
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

from pipeline.config import RunParams
from pipeline.errors import DecantError, OtherRankError, ParamsError
from pipeline.runtime.device import pick_device, require_compiler
from pipeline.runtime.launch import Launch, launch

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """A process among those that train together; alone where torchrun did not start it."""

    device: torch.device
    rank: int = 0
    count: int = 1
    grouped: bool = False  # whether there is a process group (torchrun may start a single rank)

    def sum(self, *values: float) -> list[float]:
        """The sums over ranks, added up in float64."""
        if not self.grouped:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return [float(value) for value in sums]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum(float(flag))[0] > 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in order, on all ranks."""
        values: list[Any] = [value] * self.count
        if self.grouped:
            dist.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], Value]) -> Value:
        """What `work` returns on rank 0, for all ranks; the others do not run it.

        Raises:
            OtherRankError: on the others, where it failed.
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
    """The process group of those that torchrun started, for as long as the block runs.

    Args:
        device: of params.yaml; `cuda` and `auto` take the GPU of this process's local rank.

    Raises:
        ParamsError: more processes than GPUs.
        DecantError: another rank went away, which ends this one.
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
            "the connection to another rank broke, since it ended or its machine went away: see "
            "what it printed, and run the same command to continue from the newest checkpoint"
        ) from None
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def _join(here: Launch, device: torch.device) -> None:
    """Open the process group.

    torchrun keeps its store of addresses when it starts ranks again (--max-restarts), with those of
    the ranks that are gone: each attempt uses names of its own. Over several machines, whose counts
    of attempts differ, this is left to torchrun.
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
    """Whether an error of torch says that a peer is gone; gloo has no type of its own for that."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return (
        isinstance(error, dist.DistError)
        or any(sign in str(error) for sign in ("gloo", "NCCL", "Connection"))
        or any(_lost_touch(failure) for failure, _ in failures)
    )


def parallelise(step: nn.Module, ranks: Ranks, params: RunParams) -> nn.Module:
    """A module put on this rank's device and made one of several; what training is to call.

    Parameters keep their names and their places in `step`. Blocks are changed in place: their
    forward is compiled, then repeated in backward instead of kept, as params say.

    Args:
        step: float32 parameters, the same on all ranks, and the loss as part of its forward, so
            that the engines' hooks cover the head's weight too.
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
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for module in (*blocks, step):
        fully_shard(module, mesh=mesh)
    return step


def transformer_blocks(module: nn.Module) -> list[nn.Module]:
    """The modules of its longest ModuleList, whatever architecture it is."""
    lists = [list(m) for m in module.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def local_gradients(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Gradients of a micro-batch that is not the last stay on their rank: ddp reduces once a step.

    fsdp reduces each micro-batch's: kept back, the gradients would not be sharded, and each rank
    would hold a whole student's, which is what fsdp is there to avoid.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; parameters are sharded again afterwards."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()  # the root stays gathered after a forward without a backward
        model.train()


def clip_gradients(module: nn.Module, limit: float) -> float:
    """Scale gradients to a global norm of at most `limit`; returns the norm before, of all ranks.

    It is the same on all ranks, and not finite on all where one of them had a gradient that was
    not, so all take or skip the step together.
    """
    norm: Any = nn.utils.clip_grad_norm_(module.parameters(), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def gather_parameters(module: nn.Module, ranks: Ranks) -> None:
    """Make sharded parameters whole again, on rank 0 and in the CPU's memory, so they can be saved.

    On other ranks the module is of no use afterwards.
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
