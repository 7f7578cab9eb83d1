"""Every divergence, written plainly: full rows of logits, autograd, any float dtype.

These are the twins that the fast forms (pipeline/losses/chunked.py) are tested against, and the
place to read what is minimised.

Notation: z student logits, tau temperature, q = softmax(z / tau), p the teacher at tau, T the kept
ids, p_t and q_t the mass outside T. All functions return one value a position, in nats, without
the factor tau^2 that the training objective puts before them (Hinton et al. 2015, section 2).

Shapes: n positions, K kept ids, V student vocabulary rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.topk import TopK


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(z)[label]: logits [n, V], labels int64 [n] -> [n]."""
    return -logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def full_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """KL(p || q) over the whole vocabulary, both logits [n, V] -> [n]."""
    log_p = (teacher_logits / temperature).log_softmax(-1)
    log_q = (student_logits / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def tail_bucket_kl(logits: Tensor, topk: TopK, temperature: float) -> Tensor:
    """KL between teacher and student once all ids outside T are merged into one bucket.

    L = sum_T p (log p - log q) + p_t (log p_t - log q_t)

    By the chain rule of relative entropy (Cover & Thomas 2006, theorem 2.5.3) the full divergence
    is L + p_t KL(p|tail || q|tail), so 0 <= L <= KL(p || q), with equality when K = V. The
    gradient for z / tau is q - p on T and q (1 - p_t / q_t) off T: the student is told how much
    mass belongs outside T, and nothing about how to spread it.

    Args:
        logits: [n, V]; V may exceed the teacher's valid vocabulary, whose ids are shared: rows the
            teacher does not have carry no teacher mass and belong to the tail.
        topk: the teacher, leading axis n.
        temperature: 1 or one of topk.temperatures.
    """
    log_p, tail_mass = topk.target(temperature)
    log_p, tail_mass = log_p.to(logits.dtype), tail_mass.to(logits.dtype)
    log_q = (logits / temperature).log_softmax(-1)
    kept = (log_p.exp() * (log_p - log_q.gather(-1, topk.ids))).sum(-1)
    # log(1 - sum q) would lose the tail's digits: sum the tail itself.
    log_q_tail = log_q.scatter(-1, topk.ids, -torch.inf).logsumexp(-1)
    has_tail = tail_mass > 0
    safe_mass = torch.where(has_tail, tail_mass, 1.0)
    safe_log_q = torch.where(has_tail, log_q_tail, 0.0)
    tail = torch.where(has_tail, safe_mass * (safe_mass.log() - safe_log_q), 0.0)
    return kept + tail


def sampled_kl(logits: Tensor, topk: TopK, temperature: float) -> Tensor:
    """An unbiased estimate of the full KL(p || q) from the kept ids and the draws outside them.

    L = sum_T p (log p - log q) + sum_draws w (log p - log q)

    With w from `TopK.draw_target`, E[sum of w f(v) over draws] = sum of p(v) f(v) outside T for any
    f, so value and gradient have the full divergence's as expectation (Anshumann et al. 2025,
    section 3, for K = 0). The gradient for z / tau is m q - target, where the target holds p on T
    and w on the draws and m is its sum: 1 at temperature 1, 1 in expectation elsewhere. An estimate
    may be negative, where the bucket's value may not.

    Args:
        logits: [n, V]. topk: with draws, leading axis n.
        temperature: 1 or one of topk.temperatures.
    """
    log_p, _ = topk.target(temperature)
    draw_log_p, weight = topk.draw_target(temperature)
    log_q = (logits / temperature).log_softmax(-1)
    ids = torch.cat((topk.ids, topk.draw_ids), -1)
    target = torch.cat((log_p.exp(), weight), -1).to(logits.dtype)
    difference = torch.cat((log_p, draw_log_p), -1).to(logits.dtype) - log_q.gather(-1, ids)
    return (target * difference).sum(-1)


def distillation_loss(
    logits: Tensor, labels: Tensor, topk: TopK | None, *, alpha: float, temperature: float
) -> Tensor:
    """Alpha tau^2 KL + (1 - alpha) CE per position (Hinton et al. 2015); CE alone without topk."""
    ce = cross_entropy(logits, labels)
    if topk is None:
        return ce
    divergence = sampled_kl if topk.draws else tail_bucket_kl
    kl = divergence(logits, topk, temperature)
    return alpha * temperature**2 * kl + (1.0 - alpha) * ce
