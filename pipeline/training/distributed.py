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

Gradients and weights go over NCCL on CUDA, over gloo on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pipeline.config.train_params import RunParams
from pipeline.runtime.device import require_compiler
from pipeline.runtime.ranks import Ranks


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


def clip_gradients(module: nn.Module, limit: float, loss_scale: float = 1.0) -> Tensor:
    """Divide gradients by the loss scale, then clip their global norm to `limit`.

    Returns the norm before clipping, a float32 scalar on the device.

    The norm covers all ranks and is the same on all of them. If any rank has a non-finite gradient,
    the norm is non-finite everywhere, so all ranks take or skip the step together.
    """
    if loss_scale != 1.0:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / loss_scale)
    norm: Any = nn.utils.clip_grad_norm_(module.parameters(), limit)
    whole: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return whole


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
