"""lm_head, cross-entropy and sparse KL in one pass, without tokens x vocabulary in memory.

Rows of hidden states are taken a chunk at a time: logits, loss and the loss's gradient for hidden
states and head weight are computed together in forward, in two [chunk, V] float32 buffers, and the
logits are forgotten. backward only scales what forward left. The plain twin is
`pipeline.losses.reference.distillation_loss` (tests/losses/test_chunked.py: value and gradient).

Shapes: n positions, D hidden, V vocabulary rows, K kept ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime import mm_float32
from pipeline.topk import TopK


@dataclass(frozen=True)
class LossSums:
    """Sums over positions, to be divided once by the GLOBAL token count."""

    total: Tensor  # float32 scalar with gradient: alpha tau^2 KL + (1 - alpha) CE
    ce: Tensor  # float32 scalar, nats
    kl: Tensor  # float32 scalar, nats at the temperature, without tau^2; 0 without a teacher


def distillation_loss_sums(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    topk: TopK | None,
    *,
    alpha: float,
    temperature: float,
    dtype: torch.dtype = torch.float32,
    chunk: int = 256,
) -> LossSums:
    """Alpha tau^2 KL + (1 - alpha) CE, summed over positions; CE alone without `topk`.

    Args:
        hidden: [n, D], unmasked positions only. weight: [V, D]. labels: int64 [n].
        topk: the teacher at those positions (leading axis n), or None.
        dtype: factors of the matrix products; sums are always float32.
        chunk: rows at a time; memory is 2 x chunk x V x 4 bytes.
    """
    total, ce, kl = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, topk, alpha, temperature, dtype, chunk
    )
    return LossSums(total=total, ce=ce, kl=kl)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        topk: TopK | None,
        alpha: float,
        temperature: float,
        dtype: torch.dtype,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_grad = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if need_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_grad else None
        ce_sum = torch.zeros((), device=hidden.device)
        kl_sum = torch.zeros((), device=hidden.device)
        size = min(chunk, len(hidden))
        buffers = torch.empty(2, size, len(weight), device=hidden.device)
        # On CPU mm_float32 takes float32 factors: convert once, not once a chunk.
        head = weight.detach().float() if hidden.device.type == "cpu" else weight.detach().to(dtype)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            h = hidden.detach()[rows]
            logits, work = buffers[:, : len(h)]
            mm_float32(h, head.T, dtype, out=logits)
            target = topk[rows] if topk is not None else None
            ce, kl = _loss_and_grad(
                logits, work, labels[rows], target, alpha, temperature, need_grad
            )
            ce_sum += ce
            kl_sum += kl
            if grad_hidden is not None and grad_weight is not None:
                grad_hidden[rows] = mm_float32(logits, head, dtype)
                mm_float32(logits.T, h, dtype, add_to=grad_weight)
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(ce_sum, kl_sum)
        share = alpha if topk is not None else 0.0
        return share * temperature**2 * kl_sum + (1.0 - share) * ce_sum, ce_sum, kl_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since a copy of the head's gradient costs as much as a pass over the logits;
        # so the graph can be walked once only, which torch itself enforces for saved tensors.
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        grads_in = grad_hidden.mul_(scale), grad_weight.mul_(scale)
        return *grads_in, None, None, None, None, None, None


def _loss_and_grad(
    logits: Tensor,
    work: Tensor,
    labels: Tensor,
    topk: TopK | None,
    alpha: float,
    temperature: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss sums of one chunk; `logits` is overwritten by its gradient, `work` is scratch.

    d CE / dz = softmax(z) - onehot. d (tau^2 KL) / dz = tau (m q - p) on T and
    tau (m q - p_t q / q_t) off T, where m = sum_T p + p_t is 1 up to the rounding of stored
    log-probabilities; keeping m makes this the exact derivative of the value returned.
    """
    share = alpha if topk is not None else 0.0
    peak = logits.amax(-1, keepdim=True)
    label_column = labels[:, None]
    shifted = logits.sub_(peak)
    label_logit = shifted.gather(-1, label_column)[:, 0]
    kl = logits.new_zeros(())

    if topk is None:
        total = torch.exp(shifted, out=work).sum(-1)
        ce = total.log() - label_logit
        if need_grad:
            torch.mul(work, total.reciprocal()[:, None], out=logits)
            logits.scatter_add_(-1, label_column, logits.new_full(label_column.shape, -1.0))
        return ce.sum(), kl

    if topk.draws:
        return _sampled_loss_and_grad(shifted, work, labels, topk, share, temperature, need_grad)
    log_p, tail_mass = topk.target(temperature)
    p = log_p.exp()
    torch.mul(shifted, 1.0 / temperature, out=work).exp_()  # e_v = exp((z_v - peak) / tau)
    kept_logit = shifted.gather(-1, topk.ids) / temperature
    kept_e = kept_logit.exp()
    work.scatter_(-1, topk.ids, 0.0)
    tail_total = work.sum(-1)  # q_t before normalising, summed rather than 1 - sum_T q
    total_tau = tail_total + kept_e.sum(-1)
    log_total = total_tau.log()
    log_q = kept_logit - log_total[:, None]
    has_tail = tail_mass > 0
    tiny = torch.finfo(torch.float32).tiny
    log_q_tail = tail_total.clamp_min(tiny).log() - log_total
    tail = tail_mass * (tail_mass.clamp_min(tiny).log() - log_q_tail)
    kl = ((p * (log_p - log_q)).sum(-1) + torch.where(has_tail, tail, 0.0)).sum()

    if temperature == 1.0:
        total = total_tau
    else:
        total = torch.exp(shifted).sum(-1) if not need_grad else shifted.exp_().sum(-1)
    ce = total.log() - label_logit
    if need_grad:
        scale = share * temperature
        mass = p.sum(-1) + tail_mass
        # off T: scale * e_v * (m / S - p_t / S_t); `work` holds e_v there and 0 on T
        off = mass / total_tau - torch.where(has_tail, tail_mass / tail_total.clamp_min(tiny), 0.0)
        on = scale * (mass[:, None] * kept_e / total_tau[:, None] - p)
        if temperature == 1.0:
            # softmax(z) is work / S off T and kept_e / S on T: no second exponential is needed.
            torch.mul(work, (scale * off + (1.0 - share) / total)[:, None], out=logits)
            on = on + (1.0 - share) * kept_e / total[:, None]
            logits.scatter_(-1, topk.ids, on)
        else:
            shifted.mul_(((1.0 - share) / total)[:, None])
            shifted.addcmul_(work, (scale * off)[:, None])
            shifted.scatter_add_(-1, topk.ids, on)
        label_grad = logits.new_full(label_column.shape, -(1.0 - share))
        logits.scatter_add_(-1, label_column, label_grad)
    return ce.sum(), kl


def _sampled_loss_and_grad(
    shifted: Tensor,
    work: Tensor,
    labels: Tensor,
    topk: TopK,
    share: float,
    temperature: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """`_loss_and_grad` for a target of kept ids and draws (`reference.sampled_kl`).

    d (tau^2 KL) / dz = tau (m q - target), where m is the target's sum.
    """
    log_p, _ = topk.target(temperature)
    draw_log_p, weight = topk.draw_target(temperature)
    ids = torch.cat((topk.ids, topk.draw_ids), -1)
    target = torch.cat((log_p.exp(), weight), -1)
    torch.mul(shifted, 1.0 / temperature, out=work).exp_()
    total_tau = work.sum(-1)
    log_q = shifted.gather(-1, ids) / temperature - total_tau.log()[:, None]
    kl = (target * (torch.cat((log_p, draw_log_p), -1) - log_q)).sum()
    label_logit = shifted.gather(-1, labels[:, None])[:, 0]
    total = total_tau if temperature == 1.0 else torch.exp(shifted).sum(-1)
    ce = total.log() - label_logit
    if need_grad:
        scale = share * temperature
        of_q = scale * target.sum(-1) / total_tau
        if temperature == 1.0:
            torch.mul(work, (of_q + (1.0 - share) / total)[:, None], out=shifted)
        else:
            shifted.exp_().mul_(((1.0 - share) / total)[:, None])
            shifted.addcmul_(work, of_q[:, None])
        shifted.scatter_add_(-1, ids, -scale * target)
        shifted.scatter_add_(
            -1, labels[:, None], shifted.new_full((len(labels), 1), -(1.0 - share))
        )
    return ce.sum(), kl
