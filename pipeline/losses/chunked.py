"""lm_head, cross-entropy and a sparse divergence in one pass, never tokens x vocabulary in memory.

Rows of hidden states are processed one chunk at a time. The forward pass computes logits, loss, and
the loss's gradients for hidden states and head weight together, in one [chunk, V] float32 buffer,
and then discards the logits. The backward pass only scales these gradients. A soft cap on the
logits takes a second buffer of that size, for its derivative. The plain twin is
`pipeline.losses.reference.distillation_loss` (tests/losses/test_chunked.py: value and gradient).

All ids that the teacher did not keep act as one id with the logit s = log sum exp(z_v / tau) over
them. The log_softmax of (z_T / tau, s) gives the K + 1 log-probabilities that a divergence sees, so
the loss is a function of K + 2 numbers per position, which autograd differentiates at almost no
cost. The gradient at s is passed on by ds / dz_v = exp(z_v / tau - s) / tau. Hence every divergence
makes the same passes over the vocabulary as cross-entropy alone: maximum, exponentials, their sum,
and one product. A tail with little mass loses no digits, since its sum uses a maximum of its own.

float16 needs no loss scaling within the head. The gradients that its products read are those of the
SUM over positions, at most about tau in size, and neither the division by the number of tokens nor
the loss scale has reached them yet; the products accumulate in float32. With 151,936 ids, rounding
these factors to float16 changed the head's gradient by 0.02 % of its norm, and by 0.12 % in the
half of the rows with the smaller gradients, where probabilities are below float16's normal range;
bfloat16 changed them by 0.2 % and 0.55 %. Only the backward pass through the student's body
computes divided gradients in float16. Hence the gradient of hidden states stays in float32 until
backward has multiplied it by the loss scale.

Shapes: n positions, H hidden, V vocabulary rows, K kept ids, D distinct sampled ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config.train_params import Divergence
from pipeline.losses import kernels_torch
from pipeline.losses.divergences import (
    DIVERGENCES,
    LOG_ZERO,
    bucketed_target,
    require_expressible,
    sampled_target,
)
from pipeline.losses.kernels_torch import SoftmaxKernels
from pipeline.model.logit_transform import UNCHANGED, LogitTransform, soft_cap_slope
from pipeline.runtime.numerics import as_factor, matmul_float32
from pipeline.runtime.triton_usable import triton_usable
from pipeline.targets.topk import TopK


@dataclass(frozen=True)
class LossSums:
    """Sums over positions, to be divided once, by the GLOBAL token count."""

    total: Tensor  # float32 scalar with gradient: alpha tau^2 divergence + (1 - alpha) CE
    ce: Tensor  # float32 scalar, nats
    divergence: Tensor  # float32 scalar, nats at tau, without tau^2; 0 without a teacher


@dataclass(frozen=True)
class _Objective:
    """The objective alpha tau^2 divergence + (1 - alpha) CE."""

    alpha: float
    temperature: float
    divergence: Divergence
    target_weight: float


def distillation_loss_sums(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    topk: TopK | None,
    *,
    alpha: float,
    temperature: float,
    divergence: Divergence = "forward_kl",
    target_weight: float = 1.0,
    transform: LogitTransform = UNCHANGED,
    dtype: torch.dtype = torch.float32,
    chunk: int = 256,
) -> LossSums:
    """Sum alpha tau^2 divergence + (1 - alpha) CE over positions; CE alone without `topk`.

    Args:
        hidden: [n, H], unmasked positions only.
        weight: [V, H].
        labels: int64 [n].
        topk: the teacher at those positions (leading axis n), or None. V may exceed its valid ids.
            Positions without a target count in the cross-entropy alone.
        target_weight: factor of the divergence in the total.
        transform: what the student does to its logits after the head.
        dtype: format of the factors of matrix products; sums are always float32.
        chunk: rows per chunk; the memory used is chunk x V x 4 bytes.

    Raises:
        MismatchError: the temperature was not stored, or sampled ids cannot express the divergence.
    """
    if topk is None:
        alpha, temperature = 0.0, 1.0
    else:
        require_expressible(divergence, topk)
    if not torch.is_grad_enabled():  # a Function cannot see this: grad is always off in its forward
        hidden, weight = hidden.detach(), weight.detach()
    if transform.scale != 1.0:  # n x H numbers, where the logits would be n x V
        hidden = hidden * transform.scale
    objective = _Objective(alpha, temperature, divergence, target_weight)
    total, ce, value = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, topk, objective, transform.soft_cap, dtype, chunk
    )
    return LossSums(total=total, ce=ce, divergence=value)


def logits_loss_sums(
    logits: Tensor,
    labels: Tensor,
    topk: TopK,
    *,
    alpha: float,
    temperature: float,
    divergence: Divergence = "forward_kl",
    target_weight: float = 1.0,
    chunk: int = 256,
) -> LossSums:
    """Return what `distillation_loss_sums` does, from logits [n, V] of any floating dtype.

    The logits are the student's, after any scale and soft cap. The gradient is computed with the
    loss, in a buffer of the logits' size and dtype; beyond that, the memory used is chunk x V x 4
    bytes.
    """
    require_expressible(divergence, topk)
    if not torch.is_grad_enabled():
        logits = logits.detach()
    objective = _Objective(alpha, temperature, divergence, target_weight)
    total, ce, value = _LossOfLogits.apply(  # type: ignore[no-untyped-call]
        logits, labels, topk, objective, chunk
    )
    return LossSums(total=total, ce=ce, divergence=value)


class _LossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        topk: TopK,
        objective: _Objective,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits.detach()
        need_grad = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if need_grad else None
        divergence_sum, ce_sum = (torch.zeros((), device=logits.device) for _ in range(2))
        for start in range(0, len(logits), chunk):
            rows = slice(start, min(start + chunk, len(logits)))
            part = logits[rows].to(torch.float32, copy=True)
            divergence, ce = _loss_and_grad(
                part,
                labels[rows],
                topk[rows],
                objective,
                need_grad=need_grad,
            )
            divergence_sum += divergence
            ce_sum += ce
            if gradient is not None:
                gradient[rows] = part
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(ce_sum, divergence_sum)
        return _total(divergence_sum, ce_sum, objective), ce_sum, divergence_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]), None, None, None, None


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        topk: TopK | None,
        objective: _Objective,
        soft_cap: float | None,
        dtype: torch.dtype,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = hidden.detach(), weight.detach()
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        divergence_sum, ce_sum = (torch.zeros((), device=hidden.device) for _ in range(2))
        buffer = torch.empty(min(chunk, len(hidden)), len(weight), device=hidden.device)
        head = as_factor(weight, dtype)  # once, not once per chunk
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            h = as_factor(hidden[rows], dtype)
            logits = matmul_float32(h, head.T, dtype, out=buffer[: len(h)], prepared=True)
            slope = None
            if soft_cap is not None:
                LogitTransform(soft_cap=soft_cap).apply_(logits)
                slope = soft_cap_slope(logits, soft_cap) if of_hidden or of_weight else None
            divergence, ce = _loss_and_grad(
                logits,
                labels[rows],
                topk[rows] if topk is not None else None,
                objective,
                need_grad=of_hidden or of_weight,
            )
            divergence_sum += divergence
            ce_sum += ce
            if slope is not None:
                logits *= slope
            grad = as_factor(logits, dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = matmul_float32(grad, head, dtype, prepared=True)
            if grad_weight is not None:
                matmul_float32(grad.T, h, dtype, add_to=grad_weight, prepared=True)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(ce_sum, divergence_sum)
        return _total(divergence_sum, ce_sum, objective), ce_sum, divergence_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since a copy of the head's gradient costs as much as a pass over the logits.
        # Therefore backward can run only once, which torch itself enforces for saved tensors.
        # Rounded last: grads[0] contains the loss scale, which keeps small values above zero.
        scaled = (
            grad if grad is None else grad.mul_(grads[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None, None, None


def _total(divergence: Tensor, ce: Tensor, objective: _Objective) -> Tensor:
    share = objective.alpha
    of_divergence = share * objective.target_weight * objective.temperature**2
    return of_divergence * divergence + (1.0 - share) * ce


def _loss_and_grad(
    logits: Tensor,
    labels: Tensor,
    topk: TopK | None,
    objective: _Objective,
    *,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Sum divergence and CE over one chunk, and overwrite `logits` [n, V] with their gradient."""
    tau = objective.temperature
    columns = _columns(labels, topk)
    picked = logits.gather(-1, columns)
    if topk is not None and not topk.num_sampled:
        logits.scatter_(-1, topk.ids, -torch.inf)  # the remaining ids form the bucket
    kernels = kernels_for(logits.device)
    sums = kernels.softmax_stats(logits, tau)
    rest = sums.peak / tau + sums.at_tau.log()
    rest_at_one = rest if tau == 1.0 else sums.peak + sums.at_one.log()
    with torch.set_grad_enabled(need_grad):
        for leaf in (picked, rest, rest_at_one):
            leaf.requires_grad_(need_grad)
        divergence, ce = _losses(picked, rest, rest_at_one, topk, objective)
        total = _total(divergence, ce, objective)
    if need_grad:
        leaves = (picked, rest) if tau == 1.0 else (picked, rest, rest_at_one)
        on, *off = torch.autograd.grad(total, leaves, materialize_grads=True)
        of_tau = off[0] / tau / sums.at_tau.clamp_min(1.0)
        of_one = None if tau == 1.0 else off[1] / sums.at_one.clamp_min(1.0)
        kernels.softmax_grad_(logits, sums, tau, of_tau, of_one)
        # By now the columns of T hold 0; with sampled ids they hold q's share.
        logits.scatter_add_(-1, columns, on)
    return divergence.detach(), ce.detach()


def _columns(labels: Tensor, topk: TopK | None) -> Tensor:
    """Return the ids whose logits the loss needs: kept, sampled, the label; int64 [n, ...]."""
    if topk is None:
        return labels[:, None]
    return torch.cat((topk.ids, topk.sampled_ids, labels[:, None]), -1)


def _losses(
    picked: Tensor,
    rest: Tensor,
    rest_at_one: Tensor,
    topk: TopK | None,
    objective: _Objective,
) -> tuple[Tensor, Tensor]:
    """Sum divergence and CE, from the numbers that determine them.

    Args:
        picked: [n, K + D + 1], logits of the kept ids, of the sampled ids and of the label.
        rest: [n, 1], log sum exp(z / tau) over the ids outside T, the kept ids; over all ids if
            topk has sampled ids or is None.
        rest_at_one: the same at tau = 1.
    """
    kept, label = picked[:, :-1], picked[:, -1:]
    tau = objective.temperature
    if topk is None:
        return rest.new_zeros(()), (rest_at_one - label).sum()
    if topk.num_sampled:
        _, target, negentropy = sampled_target(topk, tau)
        divergence = negentropy - (target * (kept / tau - rest)).sum(-1)
        return _sum_of_targets(divergence, topk), (rest_at_one - label).sum()
    kept = kept.masked_fill(topk.is_repeat, LOG_ZERO)
    log_q = torch.cat((kept / tau, rest), -1).log_softmax(-1).clamp_min(LOG_ZERO)
    divergence = DIVERGENCES[objective.divergence](bucketed_target(topk, tau), log_q)
    lse = torch.cat((kept, rest_at_one), -1).logsumexp(-1, keepdim=True)
    return _sum_of_targets(divergence, topk), (lse - label).sum()


def _sum_of_targets(divergence: Tensor, topk: TopK) -> Tensor:
    """Sum [n] over the positions that have a target."""
    return divergence.masked_fill(~topk.has_target, 0.0).sum()


def kernels_for(device: torch.device) -> SoftmaxKernels:
    """Return the passes over the vocabulary: Triton's on a GPU where they run, else PyTorch's."""
    if triton_usable(device):
        from pipeline.losses import kernels_triton  # it imports triton

        return kernels_triton
    return kernels_torch
