"""Find values in long rows by blocks: the k largest ones, and ids sampled by inversion.

Both the passes of PyTorch and the Triton kernels reduce rows to numbers per block first.

Shapes: n rows, V values per row, k values to find, M sampled ids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 64  # values per block
_SMALL_BLOCK = 8  # values per block in the second stage of `block_top_k`; divides BLOCK


def sample_by_inversion(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw ids, int64 [n, M], in proportion to weights [n, V]; uniforms [n, M] decide them."""
    size = weights.shape[-1]
    whole = size // BLOCK * BLOCK
    sums = weights[:, :whole].view(len(weights), whole // BLOCK, BLOCK).sum(-1)
    if size > whole:
        sums = torch.cat((sums, weights[:, whole:].sum(-1, keepdim=True)), -1)

    def weights_of(blocks: Tensor) -> Tensor:
        ids = blocks[..., None] * BLOCK + torch.arange(BLOCK, device=weights.device)
        found = weights.gather(-1, ids.clamp_max(size - 1).flatten(1)).view(ids.shape)
        return torch.where(ids < size, found, 0.0)

    return invert_block_sums(sums, uniforms, weights_of, size)


def invert_block_sums(
    sums: Tensor, uniforms: Tensor, weights_of: Callable[[Tensor], Tensor], size: int
) -> Tensor:
    """Draw ids from the sums of blocks, then from the weights of the blocks drawn.

    This gives the same ids as inverting one cumulative sum over V, at the cost of one pass.

    Args:
        sums: float32 [n, blocks], the sum of the weights of each block.
        uniforms: [n, M].
        weights_of: maps blocks, int64 [n, M], to their weights, float32 [n, M, BLOCK], which are 0
            beyond the end of the row.
        size: V.
    """
    sums = sums.double()
    running = sums.cumsum(-1)
    place = uniforms.double() * running[:, -1:]
    block = torch.searchsorted(running, place, right=True).clamp_max(sums.shape[-1] - 1)
    within = (place - (running - sums).gather(-1, block)) / sums.gather(-1, block)
    inner = weights_of(block).double().cumsum(-1)
    # Scale to the block's own sum, so that rounding cannot step past its last possible id.
    step = (inner <= (within.clamp(0.0, 1.0) * inner[..., -1])[..., None]).sum(-1)
    last = (inner < inner[..., -1:]).sum(-1)  # the last id whose weight is not 0
    return (block * BLOCK + torch.minimum(step, last)).clamp_max(size - 1)


def block_top_k(values: Tensor, k: int, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute torch.topk by blocks: the k blocks with the largest maxima hold the k largest values.

    The values equal those of `torch.topk(values, k)` and take a third of the time on a large last
    axis; among equal values the ids may differ. The plain twin is torch.topk itself. The values in
    the chosen blocks are reduced to the k best small blocks before they are sorted.

    Args:
        values: [n, V].
        maxima: [n, blocks], the maximum of each block of `BLOCK` values, if already known.
    """
    size = values.shape[-1]
    blocks = size // BLOCK
    if blocks <= k or not k:
        top = values.topk(k, dim=-1)
        return top.values, top.indices
    body = values[:, : blocks * BLOCK].view(-1, blocks, BLOCK)
    largest = body.amax(-1) if maxima is None else maxima[:, :blocks]
    best = largest.topk(k, dim=-1, sorted=False).indices
    candidates = _taken(body, best)  # [n, k * BLOCK]
    small = candidates.view(len(values), k * BLOCK // _SMALL_BLOCK, _SMALL_BLOCK)
    best_small = small.amax(-1).topk(k, dim=-1, sorted=False).indices
    candidates = _taken(small, best_small)  # [n, k * _SMALL_BLOCK]
    rest = values[:, blocks * BLOCK :]
    top = torch.cat((candidates, rest), dim=-1).topk(k, dim=-1)
    # Map back through the stages: index among candidates -> in the chosen blocks -> in the row.
    place = top.indices.clamp_max(k * _SMALL_BLOCK - 1)
    place = best_small.gather(-1, place // _SMALL_BLOCK) * _SMALL_BLOCK + place % _SMALL_BLOCK
    ids = best.gather(-1, place // BLOCK) * BLOCK + place % BLOCK
    in_rest = top.indices - k * _SMALL_BLOCK + blocks * BLOCK
    return top.values, torch.where(top.indices < k * _SMALL_BLOCK, ids, in_rest)


def _taken(blocks: Tensor, which: Tensor) -> Tensor:
    """Gather the chosen blocks of each row: [n, blocks, size] and [n, k] -> [n, k * size]."""
    rows = torch.arange(len(blocks), device=blocks.device)[:, None]
    return blocks[rows, which].flatten(1)
