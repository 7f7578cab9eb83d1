"""The divergences between teacher and student, each as a function of a few log-probabilities.

Notation: z student logits, tau temperature, q = softmax(z / tau), p the teacher at tau, T the kept
ids, p_t and q_t the mass outside T. All functions return one value per position, in nats, without
the factor tau^2 that the training objective puts before them (Hinton et al. 2015, section 2).

A divergence D in `DIVERGENCES` sees K + 1 probabilities on each side: those of the kept ids, and
one for all ids outside T, merged into a bucket (`losses.reference.bucketed`). With h_j = dD / dq_j,
its gradient is

    dD / d(z_v / tau) = q_v (h_v - sum_j q_j h_j) on T,   q_v (h_t - sum_j q_j h_j) off T

where j runs over T and the bucket t. Off T the student is told how much mass belongs there, but not
how to spread it. An f-divergence's summand q f(p / q) is convex and homogeneous in (p, q), so
merging outcomes never increases the sum (the data-processing inequality, Csiszar 1967). Hence the
merged divergence is a LOWER BOUND of the one over the whole vocabulary, and EXACT if teacher and
student spread the tail in the same way, for example if K = V. All of `DIVERGENCES` except
`renormalised_kl` are f-divergences.

Shapes: n positions, K kept ids, D distinct sampled ids, V student vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.config.train_params import Divergence
from pipeline.errors import MismatchError
from pipeline.targets.topk import TopK, sum_p_log_p

LOG_ZERO = -1e4  # stands for log 0, so that 0 log 0 is 0 in value and gradient
SKEW = 0.1  # a, as in the experiments of Ko et al. 2024
_LEAST_TAIL = 1e-6  # as log-probabilities are rounded, a smaller tail is indistinguishable from 0


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) = sum_j p (log p - log q), the default and a lower bound of the full KL.

    By the chain rule of relative entropy (Cover & Thomas 2006, theorem 2.5.3) the full divergence
    is this one plus p_t KL(p|tail || q|tail), so 0 <= this <= full. The gradient for z / tau is
    q - p on T and q (1 - p_t / q_t) off T.

    Args:
        log_p: [..., K + 1], as in all functions that follow.
        log_q: [..., K + 1], as in all functions that follow.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def renormalised_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL after both sides are cut to T and renormalised, as many tools do. BIASED.

    With p' = p / sum_T p and q' = q / sum_T q, the value is sum_T p' (log p' - log q'), and the
    gradient for z / tau is q' - p' on T and 0 off T. It is the conditional part of the chain rule
    on {T, rest}. It is neither a bound nor an estimate of the full KL, and is 0 for a student that
    has p's ratios on T and any mass outside T. It is here for comparison.
    """
    return forward_kl(log_p[..., :-1].log_softmax(-1), log_q[..., :-1].log_softmax(-1))


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(q || p) = sum_j q (log q - log p) (Gu et al. 2024, eq. 1), a lower bound.

    The gradient for z / tau is q (log(q / p) - KL(q || p)) on T and
    q (log(q_t / p_t) - KL(q || p)) off T. It is infinite if the student has mass where the teacher
    has none. To avoid dividing by a p_t that rounding made 0, p_t is taken as at least 1e-6, which
    can only lower the value, to 1e-6 nats below 0 at most.
    """
    log_p_tail = log_p[..., -1:].clamp_min(math.log(_LEAST_TAIL))
    log_p = torch.cat((log_p[..., :-1], log_p_tail), -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 (Lin 1991, section 4).

    This is the generalised form of Agarwal et al. 2024 (eq. 1) at beta = 1/2. It is a lower bound,
    and at most log 2. The gradient for z / tau is q (log(q / m) - KL(q || m)) / 2 on T and
    q (log(q_t / m_t) - KL(q || m)) / 2 off T.
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return (forward_kl(log_p, log_m) + forward_kl(log_q, log_m)) / 2.0


def skew_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || m) with m = a p + (1 - a) q, a = 0.1 (Ko et al. 2024, section 3).

    It is a lower bound, and at most -log a. In the gradient for z / tau (see the top of this file)
    h_j = -(1 - a) p_j / m_j, which is at most (1 - a) / a in magnitude, whereas the forward KL's
    -p_j / q_j is unbounded.
    """
    return forward_kl(log_p, _mixture(log_p, log_q))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(q || m) with m = a q + (1 - a) p, a = 0.1 (Ko et al. 2024, section 3).

    It is a lower bound, and at most -log a. In the gradient for z / tau
    h_j = log(q_j / m_j) + 1 - a q_j / m_j.
    """
    return forward_kl(log_q, _mixture(log_q, log_p))


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return sum_j |p - q| / 2 (Wen et al. 2023, section 3), a lower bound and at most 1.

    In the gradient for z / tau h_j = sign(q_j - p_j) / 2, which does not vanish as q approaches p.
    """
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2.0


def _mixture(log_some: Tensor, log_most: Tensor) -> Tensor:
    """Return log(a some + (1 - a) most)."""
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
    """Check that the target can express the divergence.

    Sampled ids estimate expectations under the teacher, and forward KL is the only divergence that
    is such an expectation.

    Raises:
        MismatchError: the target has sampled ids and the divergence is not forward KL.
    """
    if topk.num_sampled and divergence != "forward_kl":
        raise MismatchError(
            f"divergence={divergence} cannot be estimated from a teacher kept with "
            f"{topk.num_sampled} sampled ids per position: set train.divergence to forward_kl, or "
            "capture with prepare.num_sampled=0"
        )


def bucketed_target(topk: TopK, temperature: float) -> Tensor:
    """Return the teacher's side of `bucketed`: float32 [n, K + 1]."""
    log_p, tail_mass = topk.target(temperature)
    return torch.cat((log_p, tail_mass.log()[..., None]), -1).clamp_min(LOG_ZERO)


def sampled_target(topk: TopK, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the teacher's side of `sampled_kl`.

    Returns:
        ids int64 [n, K + D], their target mass float32 [n, K + D], and sum_v p log p over the whole
        vocabulary, float32 [n]: exact at temperature 1, otherwise estimated from the sampled ids.
    """
    log_p, _ = topk.target(temperature)
    weight, outside = topk.sampled_target(temperature)
    p = log_p.exp()
    ids = torch.cat((topk.ids, topk.sampled_ids), -1)
    return ids, torch.cat((p, weight), -1), outside + sum_p_log_p(p)
