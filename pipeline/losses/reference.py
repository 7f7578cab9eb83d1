"""Every divergence, written plainly: full rows of logits, autograd, any float dtype.

These are the twins that the fast forms (pipeline/losses/chunked.py) are tested against, and the
place to read what is minimised.

Notation: z student logits, tau temperature, q = softmax(z / tau), p the teacher at tau, T the kept
ids, p_t and q_t the mass outside T. All functions return one value a position, in nats, without
the factor tau^2 that the training objective puts before them (Hinton et al. 2015, section 2).

A divergence D of `DIVERGENCES` sees K + 1 probabilities a side: those of the kept ids, and one for
all ids outside T, merged into a bucket (`bucketed`). With h_j = dD / dq_j, its gradient is

    dD / d(z_v / tau) = q_v (h_v - sum_j q_j h_j) on T,   q_v (h_t - sum_j q_j h_j) off T

where j runs over T and the bucket t: off T the student is told how much mass belongs there, and
nothing about how to spread it. An f-divergence's summand q f(p / q) is convex and homogeneous in
(p, q), so that merging outcomes never raises the sum (the data-processing inequality, Csiszar
1967): the merged divergence is a LOWER BOUND of the one over the whole vocabulary, and EXACT where
teacher and student spread the tail alike, K = V among them. All of `DIVERGENCES` but
`renormalised_kl` are f-divergences.

Shapes: n positions, K kept ids, V student vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.config import Divergence
from pipeline.errors import MismatchError
from pipeline.topk import TopK

LOG_ZERO = -1e4  # stands for log 0, so that 0 log 0 is 0 in value and gradient
SKEW = 0.1  # a, as in the experiments of Ko et al. 2024
_LEAST_TAIL = 1e-6  # stored log-probabilities are rounded: a smaller tail is not known from none


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(z)[label]: logits [n, V], labels int64 [n] -> [n]."""
    return -logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def full_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """KL(p || q) over the whole vocabulary, both logits [n, V] -> [n]."""
    log_p = (teacher_logits / temperature).log_softmax(-1)
    log_q = (student_logits / temperature).log_softmax(-1)
    return forward_kl(log_p, log_q)


def bucketed(logits: Tensor, topk: TopK, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student on the kept ids and, last, of all others together.

    Args:
        logits: [n, V]; V may exceed the teacher's valid vocabulary, whose ids are shared: rows the
            teacher does not have carry no teacher mass and belong to the bucket.
        topk: the teacher, leading axis n.
        temperature: 1 or one of topk.temperatures.

    Returns:
        log_p and log_q [n, K + 1]; an empty bucket has LOG_ZERO.
    """
    log_p = bucketed_target(topk, temperature).to(logits.dtype)
    log_q = (logits / temperature).log_softmax(-1)
    # log(1 - sum q) would lose the tail's digits: sum the tail itself.
    log_q_tail = log_q.scatter(-1, topk.ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat((log_q.gather(-1, topk.ids), log_q_tail), -1)
    return log_p, log_q.clamp_min(LOG_ZERO)


def bucketed_target(topk: TopK, temperature: float) -> Tensor:
    """The teacher's side of `bucketed`: float32 [n, K + 1]."""
    log_p, tail_mass = topk.target(temperature)
    return torch.cat((log_p, tail_mass.log()[..., None]), -1).clamp_min(LOG_ZERO)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_j p (log p - log q): the default. Lower bound of the full one.

    By the chain rule of relative entropy (Cover & Thomas 2006, theorem 2.5.3) the full divergence
    is this plus p_t KL(p|tail || q|tail), so 0 <= this <= full. Gradient for z / tau: q - p on T,
    q (1 - p_t / q_t) off T.

    Args:
        log_p: [..., K + 1]. log_q: [..., K + 1]; so in all that follow.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def renormalised_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL once both sides are cut to T and renormalised: what many tools minimise. BIASED.

    p' = p / sum_T p, q' = q / sum_T q, value sum_T p' (log p' - log q'), gradient for z / tau
    q' - p' on T and 0 off T. It is the conditional part of the chain rule on {T, rest}: neither
    bound nor estimate of the full KL, and 0 for a student that has p's ratios on T and any mass
    outside it. Here to compare with.
    """
    return forward_kl(log_p[..., :-1].log_softmax(-1), log_q[..., :-1].log_softmax(-1))


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = sum_j q (log q - log p) (Gu et al. 2024, eq. 1). Lower bound of the full one.

    Gradient for z / tau: q (log(q / p) - KL(q || p)) on T, q (log(q_t / p_t) - KL(q || p)) off T.
    It is infinite where the teacher has nothing and the student something; so as not to divide by
    what rounding made 0, p_t is taken as no less than 1e-6, which can only lower the value, by
    1e-6 nats below 0 at most.
    """
    log_p_tail = log_p[..., -1:].clamp_min(math.log(_LEAST_TAIL))
    log_p = torch.cat((log_p[..., :-1], log_p_tail), -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 (Lin 1991, section 4). Lower bound.

    The generalised form of Agarwal et al. 2024 (eq. 1) at beta = 1/2. At most log 2. Gradient for
    z / tau: q (log(q / m) - KL(q || m)) / 2 on T, q (log(q_t / m_t) - KL(q || m)) / 2 off T.
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return (forward_kl(log_p, log_m) + forward_kl(log_q, log_m)) / 2.0


def skew_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || m) with m = a p + (1 - a) q, a = 0.1 (Ko et al. 2024, section 3). Lower bound.

    At most -log a. In the gradient for z / tau (see the top of this file) h_j = -(1 - a) p_j / m_j,
    at most (1 - a) / a in size, where the forward KL's -p_j / q_j has no bound.
    """
    return forward_kl(log_p, _mixture(log_p, log_q))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || m) with m = a q + (1 - a) p, a = 0.1 (Ko et al. 2024, section 3). Lower bound.

    At most -log a. In the gradient for z / tau h_j = log(q_j / m_j) + 1 - a q_j / m_j.
    """
    return forward_kl(log_q, _mixture(log_q, log_p))


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_j |p - q| / 2 (Wen et al. 2023, section 3). Lower bound; at most 1.

    In the gradient for z / tau h_j = sign(q_j - p_j) / 2; it does not vanish towards p = q.
    """
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2.0


def _mixture(log_some: Tensor, log_most: Tensor) -> Tensor:
    """log(a some + (1 - a) most)."""
    return torch.logaddexp(log_some + math.log(SKEW), log_most + math.log(1.0 - SKEW))


DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "renormalised_kl": renormalised_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


def require_expressible(divergence: Divergence, topk: TopK) -> None:
    """Draws estimate expectations under the teacher, and of all these only forward KL is one.

    Raises:
        MismatchError: the target holds draws and the divergence is another.
    """
    if topk.draws and divergence != "forward_kl":
        raise MismatchError(
            f"divergence={divergence} cannot be estimated from a teacher kept with "
            f"{topk.draws} draws a position: set train.divergence to forward_kl, or capture with "
            "prepare.draws=0"
        )


def tail_bucket_kl(logits: Tensor, topk: TopK, temperature: float) -> Tensor:
    """`forward_kl` of `bucketed`: the default divergence, from logits [n, V] -> [n]."""
    return forward_kl(*bucketed(logits, topk, temperature))


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
    ids, target, log_p = sampled_target(topk, temperature)
    log_q = (logits / temperature).log_softmax(-1).gather(-1, ids)
    return (target.to(logits.dtype) * (log_p.to(logits.dtype) - log_q)).sum(-1)


def sampled_target(topk: TopK, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's side of `sampled_kl`: ids, the mass each stands for, log p, all [n, K + M]."""
    log_p, _ = topk.target(temperature)
    draw_log_p, weight = topk.draw_target(temperature)
    ids = torch.cat((topk.ids, topk.draw_ids), -1)
    return ids, torch.cat((log_p.exp(), weight), -1), torch.cat((log_p, draw_log_p), -1)


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    topk: TopK | None,
    *,
    alpha: float,
    temperature: float,
    divergence: Divergence = "forward_kl",
) -> Tensor:
    """Alpha tau^2 D + (1 - alpha) CE per position (Hinton et al. 2015); CE alone without topk.

    Raises:
        MismatchError: `require_expressible`, or a temperature that was not stored.
    """
    ce = cross_entropy(logits, labels)
    if topk is None:
        return ce
    require_expressible(divergence, topk)
    if topk.draws:
        value = sampled_kl(logits, topk, temperature)
    else:
        value = DIVERGENCES[divergence](*bucketed(logits, topk, temperature))
    return alpha * temperature**2 * value + (1.0 - alpha) * ce
