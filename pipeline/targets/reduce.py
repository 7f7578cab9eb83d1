"""Reduce full rows of logits to TopK, with exact normalisers, entropy and sampled ids.

This happens in one place only, so that capture, the live teacher, the gate and every benchmark keep
the same numbers.

Shapes: n positions, K kept ids, M sampled ids, J stored temperatures, V valid vocabulary (the ids a
tokenizer can produce; rows of the head beyond it are padding and are left out of every sum).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ParamsError
from pipeline.targets.topk import TopK

_BLOCK = 64  # logits per block in `block_top_k`
_SMALL_BLOCK = 8  # logits per block in its second stage; divides _BLOCK
_ROWS_AT_ONCE_ON_CPU = 8  # so that the rows being reduced stay in the processor's cache


@torch.no_grad()
def top_k_from_logits(
    logits: Tensor, k: int, temperatures: tuple[float, ...], uniforms: Tensor | None = None
) -> TopK:
    """Reduce full rows of logits to TopK.

    Args:
        logits: float32 [n, V], valid ids only.
        k: ids to keep, 0..V.
        temperatures: the temperatures whose normalisers are kept.
        uniforms: float [n, M] in [0, 1), which decide the M sampled ids; None samples nothing.

    The row's maximum is subtracted first, in float32, so that no exponential overflows; rounding
    a raw logit later would cost 30 times more than rounding a log-probability.
    """
    n, vocab_size = logits.shape
    if k > vocab_size:
        raise ParamsError(
            f"k={k} exceeds the {vocab_size} ids of the vocabulary: lower prepare.k, or train.k if "
            "it is set"
        )
    at_once = _ROWS_AT_ONCE_ON_CPU if logits.device.type == "cpu" else n
    work = torch.empty(min(n, at_once), vocab_size, device=logits.device)
    maxima = torch.empty(n, -(-vocab_size // _BLOCK), device=logits.device)
    peak = torch.empty(n, 1, device=logits.device)
    taus = sorted({1.0, *temperatures}, reverse=True)
    sums = {tau: torch.empty(n, device=logits.device) for tau in taus}
    weighted = torch.empty(n, device=logits.device)
    for first in range(0, n, at_once):
        rows = slice(first, first + at_once)
        part = {tau: total[rows] for tau, total in sums.items()}
        _reduce(logits[rows], work, maxima[rows], peak[rows], part, weighted[rows])
    log_total = sums[1.0].log()
    lse = peak + log_total[:, None]
    values, ids = block_top_k(logits, k, maxima)
    # sum_v exp(logprob_v / tau), with logprob_v = logit_v - peak - log_total; 0 at tau = 1
    lse_tau = [sums[tau].log() - log_total / tau for tau in temperatures]
    sampled_ids = _sample(logits, lse, ids, uniforms, work)
    return TopK(
        ids=ids,
        logprobs=values - peak - log_total[:, None],  # not `- lse`, which is already rounded
        lse=lse[:, 0],
        lse_tau=torch.stack(lse_tau, -1) if lse_tau else logits.new_empty(n, 0),
        entropy=(lse[:, 0] - weighted / sums[1.0]).clamp_min(0.0),
        sampled_ids=sampled_ids,
        sampled_logprobs=logits.gather(-1, sampled_ids) - peak - log_total[:, None],
        temperatures=temperatures,
        vocab_size=vocab_size,
    )


def _reduce(
    logits: Tensor,
    work: Tensor,
    maxima: Tensor,
    peak: Tensor,
    sums: dict[float, Tensor],
    weighted: Tensor,
) -> None:
    """Run all passes over full rows, on as many rows as fit into the processor's cache.

    The logits are only read, since writing them would cost as much as two of the passes.

    Args:
        logits: [r, V].
        work: [>= r, V], scratch memory.
        maxima: [r, blocks], filled with the maximum of each block of `_BLOCK` logits.
        peak: [r, 1], filled with the maximum of each row.
        sums: [r] by descending temperature, 1 included; each is filled with
            sum_v exp(x_v / tau), x_v = logit_v - peak.
        weighted: [r], filled with sum_v logit_v exp(x_v).
    """
    work = work[: len(logits)]
    whole = logits.shape[-1] // _BLOCK
    if whole:
        body = logits[:, : whole * _BLOCK].view(len(logits), whole, _BLOCK)
        torch.amax(body, -1, out=maxima[:, :whole])
    if whole < maxima.shape[-1]:
        maxima[:, -1] = logits[:, whole * _BLOCK :].amax(-1)
    torch.amax(maxima, -1, keepdim=True, out=peak)
    last = 0.0
    for tau, total in sums.items():
        # exp(x / 2) is the square of exp(x / 4), and a product costs a third as much as an exp.
        if last == 2.0 * tau:
            work.square_()
        else:
            torch.add(peak * (-1.0 / tau), logits, alpha=1.0 / tau, out=work).exp_()
        torch.sum(work, -1, out=total)
        last = tau
        if tau == 1.0:
            torch.sum(work.mul_(logits), -1, out=weighted)
            last = 0.0  # `work` no longer holds exponentials


def row_uniforms(rows: Iterable[int], length: int, num_sampled: int, seed: int) -> Tensor:
    """Return the uniforms that decide the sampled ids: float32 [B, L, M] in [0, 1).

    They depend on (seed, row) alone, so a shard holds the same sampled ids whichever process
    captures it, and an online teacher samples the same ids.
    """
    return torch.from_numpy(
        np.stack(
            [
                np.random.default_rng([seed, row]).random((length, num_sampled), dtype=np.float32)
                for row in rows
            ]
        )
    )


def _sample(
    logits: Tensor, lse: Tensor, kept: Tensor, uniforms: Tensor | None, work: Tensor
) -> Tensor:
    """Draw ids in proportion to exp(logits) outside the kept ids, by inversion in two stages.

    The first stage finds the block of `_BLOCK` ids in the cumulative sum of block sums; the second
    finds the id in the cumulative sum within that block. This gives the same ids as inverting one
    cumulative sum over V, at the cost of one pass.

    Args:
        logits: float32 [n, V].
        lse: [n, 1].
        kept: int64 [n, K].
        uniforms: float [n, M] in [0, 1), or None.
        work: float32 [r, V], with r the number of rows processed at once.

    Returns:
        int64 [n, M]; arbitrary ids where there is no mass outside the kept ids.
    """
    if uniforms is None or not uniforms.shape[-1]:
        return kept.new_empty(len(kept), 0)
    parts = []
    for rows, shift, ids, chances in zip(
        *(torch.split(t, len(work)) for t in (logits, lse, kept, uniforms)), strict=True
    ):
        weights = torch.sub(rows, shift, out=work[: len(rows)]).exp_().scatter_(-1, ids, 0.0)
        parts.append(sample_by_inversion(weights, chances))
    return torch.cat(parts)


def sample_by_inversion(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw ids, int64 [r, M], in proportion to weights [r, V]; uniforms [r, M] decide them."""
    size = weights.shape[-1]
    whole = size // _BLOCK * _BLOCK
    blocks = weights[:, :whole].view(len(weights), -1, _BLOCK).sum(-1).double()
    if size > whole:
        blocks = torch.cat((blocks, weights[:, whole:].sum(-1, keepdim=True).double()), -1)
    running = blocks.cumsum(-1)
    place = uniforms.double() * running[:, -1:]
    block = torch.searchsorted(running, place, right=True).clamp_max(blocks.shape[-1] - 1)
    within = (place - (running - blocks).gather(-1, block)) / blocks.gather(-1, block)
    ids = block[..., None] * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    found = weights.gather(-1, ids.clamp_max(size - 1).flatten(1)).view(ids.shape)
    inner = torch.where(ids < size, found, 0.0).double().cumsum(-1)
    # Scale to the block's own sum, so that rounding cannot step past its last possible id.
    step = (inner <= (within.clamp(0.0, 1.0) * inner[..., -1])[..., None]).sum(-1)
    last = (inner < inner[..., -1:]).sum(-1)  # the last id whose weight is not 0
    return (block * _BLOCK + torch.minimum(step, last)).clamp_max(size - 1)


def block_top_k(values: Tensor, k: int, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute torch.topk by blocks: the k blocks with the largest maxima hold the k largest values.

    The values equal those of `torch.topk(values, k)` and take a third of the time on a large last
    axis; among equal values the ids may differ. The plain twin is torch.topk itself. The values in
    the chosen blocks are reduced to the k best small blocks before they are sorted.

    Args:
        values: [n, V].
        maxima: [n, blocks], the maximum of each block of `_BLOCK` values, if already known.
    """
    size = values.shape[-1]
    blocks = size // _BLOCK
    if blocks <= k or not k:
        top = values.topk(k, dim=-1)
        return top.values, top.indices
    body = values[:, : blocks * _BLOCK].view(-1, blocks, _BLOCK)
    largest = body.amax(-1) if maxima is None else maxima[:, :blocks]
    best = largest.topk(k, dim=-1, sorted=False).indices
    candidates = _taken(body, best)  # [n, k * _BLOCK]
    small = candidates.view(len(values), -1, _SMALL_BLOCK)
    best_small = small.amax(-1).topk(k, dim=-1, sorted=False).indices
    candidates = _taken(small, best_small)  # [n, k * _SMALL_BLOCK]
    rest = values[:, blocks * _BLOCK :]
    top = torch.cat((candidates, rest), dim=-1).topk(k, dim=-1)
    # Map back through the stages: index among candidates -> in the chosen blocks -> in the row.
    place = top.indices.clamp_max(k * _SMALL_BLOCK - 1)
    place = best_small.gather(-1, place // _SMALL_BLOCK) * _SMALL_BLOCK + place % _SMALL_BLOCK
    ids = best.gather(-1, place // _BLOCK) * _BLOCK + place % _BLOCK
    in_rest = top.indices - k * _SMALL_BLOCK + blocks * _BLOCK
    return top.values, torch.where(top.indices < k * _SMALL_BLOCK, ids, in_rest)


def _taken(blocks: Tensor, which: Tensor) -> Tensor:
    """Gather the chosen blocks of each row: [n, blocks, size] and [n, k] -> [n, k * size]."""
    rows = torch.arange(len(blocks), device=blocks.device)[:, None]
    return blocks[rows, which].flatten(1)
