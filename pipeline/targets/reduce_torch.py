"""Reduce rows of logits to TopK by passes of PyTorch's operators, on any device.

`pipeline.targets.reduce_triton` is the twin for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.targets import block_search
from pipeline.targets.block_search import BLOCK
from pipeline.targets.selection import count_distinct, cut_to_mass
from pipeline.targets.topk import TopK

_ROWS_AT_ONCE_ON_CPU = 8  # so that the rows being reduced stay in the processor's cache


def reduce_rows(
    logits: Tensor,
    k: int,
    temperatures: tuple[float, ...],
    uniforms: Tensor | None,
    top_p: float | None = None,
) -> TopK:
    """Compute `reduce.top_k_from_logits`.

    The row's maximum is subtracted first, in float32, so that no exponential overflows; rounding
    a raw logit later would cost 30 times more than rounding a log-probability.
    """
    n, vocab_size = logits.shape
    at_once = _ROWS_AT_ONCE_ON_CPU if logits.device.type == "cpu" else n
    work = torch.empty(min(n, at_once), vocab_size, device=logits.device)
    maxima = torch.empty(n, -(-vocab_size // BLOCK), device=logits.device)
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
    values, ids = block_search.block_top_k(logits, k, maxima)
    # sum_v exp(logprob_v / tau), with logprob_v = logit_v - peak - log_total; 0 at tau = 1
    lse_tau = [sums[tau].log() - log_total / tau for tau in temperatures]
    logprobs = values - peak - log_total[:, None]  # not `- lse`, which is already rounded
    ids, logprobs = cut_to_mass(ids, logprobs, top_p)
    sampled_ids, sampled_counts = count_distinct(_sample(logits, lse, ids, uniforms, work))
    needed = sampled_ids if temperatures else sampled_ids[:, :0]
    return TopK(
        has_target=torch.ones(n, dtype=torch.bool, device=logits.device),
        ids=ids,
        logprobs=logprobs,
        lse=lse[:, 0],
        lse_tau=torch.stack(lse_tau, -1) if lse_tau else logits.new_empty(n, 0),
        entropy=(lse[:, 0] - weighted / sums[1.0]).clamp_min(0.0),
        sampled_ids=sampled_ids,
        sampled_counts=sampled_counts,
        sampled_logprobs=logits.gather(-1, needed) - peak - log_total[:, None],
        num_sampled=0 if uniforms is None else uniforms.shape[-1],
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
        maxima: [r, blocks], filled with the maximum of each block of `BLOCK` logits.
        peak: [r, 1], filled with the maximum of each row.
        sums: [r] by descending temperature, 1 included; each is filled with
            sum_v exp(x_v / tau), x_v = logit_v - peak.
        weighted: [r], filled with sum_v logit_v exp(x_v).
    """
    work = work[: len(logits)]
    whole = logits.shape[-1] // BLOCK
    if whole:
        body = logits[:, : whole * BLOCK].view(len(logits), whole, BLOCK)
        torch.amax(body, -1, out=maxima[:, :whole])
    if whole < maxima.shape[-1]:
        maxima[:, -1] = logits[:, whole * BLOCK :].amax(-1)
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


def _sample(
    logits: Tensor, lse: Tensor, kept: Tensor, uniforms: Tensor | None, work: Tensor
) -> Tensor:
    """Draw ids in proportion to exp(logits) outside the kept ids.

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
        parts.append(block_search.sample_by_inversion(weights, chances))
    return torch.cat(parts)
