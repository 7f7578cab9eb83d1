"""Every loss in its plain form: full rows of logits, autograd, any float dtype.

These are the twins that the fast forms (pipeline/losses/chunked.py) are tested against. They take
the whole vocabulary; `pipeline/losses/divergences.py` defines the divergences and the notation.

Shapes: n positions, K kept ids, D distinct sampled ids, V student vocabulary rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config.train_params import Divergence
from pipeline.losses.divergences import (
    DIVERGENCES,
    LOG_ZERO,
    bucketed_target,
    forward_kl,
    require_expressible,
    sampled_target,
)
from pipeline.model.logit_transform import LogitTransform
from pipeline.targets.topk import TopK


def transformed(logits: Tensor, transform: LogitTransform) -> Tensor:
    """Return a model's logits, given its head's output [n, V]."""
    logits = logits * transform.scale
    cap = transform.soft_cap
    return logits if cap is None else cap * (logits / cap).tanh()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(z)[label], [n], for logits [n, V] and labels int64 [n]."""
    return -logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def full_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """Return KL(p || q) over the whole vocabulary, [n], for logits [n, V] of both."""
    log_p = (teacher_logits / temperature).log_softmax(-1)
    log_q = (student_logits / temperature).log_softmax(-1)
    return forward_kl(log_p, log_q)


def bucketed(logits: Tensor, topk: TopK, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of teacher and student: the kept ids, then all others together.

    Args:
        logits: [n, V]; V may exceed the teacher's valid vocabulary, whose ids the student shares.
            Rows that the teacher does not have carry no teacher mass and belong to the bucket.
        topk: the teacher, leading axis n.
        temperature: 1 or one of topk.temperatures.

    Returns:
        log_p and log_q [n, K + 1]; an empty bucket has LOG_ZERO.
    """
    log_p = bucketed_target(topk, temperature).to(logits.dtype)
    log_q = (logits / temperature).log_softmax(-1)
    # log(1 - sum q) would lose the tail's digits: sum the tail itself.
    log_q_tail = log_q.scatter(-1, topk.ids, -torch.inf).logsumexp(-1, keepdim=True)
    of_kept = log_q.gather(-1, topk.ids).masked_fill(topk.is_repeat, LOG_ZERO)
    return log_p, torch.cat((of_kept, log_q_tail), -1).clamp_min(LOG_ZERO)


def tail_bucket_kl(logits: Tensor, topk: TopK, temperature: float) -> Tensor:
    """Return the default divergence, `forward_kl` of `bucketed`: [n] from logits [n, V]."""
    return forward_kl(*bucketed(logits, topk, temperature))


def sampled_kl(logits: Tensor, topk: TopK, temperature: float) -> Tensor:
    """Estimate the full KL(p || q) without bias from the kept ids and the sampled ids outside them.

    L = sum_v p log p - sum_T p log q - sum_sampled w log q

    With w from `TopK.sampled_target`, E[sum of w f(v) over sampled ids] = sum of p(v) f(v) outside
    T for any f. The first term is exact at temperature 1 and otherwise estimated in this way. So
    the expectations of value and gradient are those of the full divergence
    (Anshumann et al. 2025, section 3, for K = 0). The gradient for z / tau is m q - target, where
    the target is p on T and w on the sampled ids, and m is its sum: 1 at temperature 1, and 1 in
    expectation at other temperatures. Unlike the bucket's value, the estimate may be negative.

    Args:
        logits: [n, V].
        topk: the teacher, with sampled ids; leading axis n.
        temperature: 1 or one of topk.temperatures.
    """
    ids, target, negentropy = sampled_target(topk, temperature)
    log_q = (logits / temperature).log_softmax(-1).gather(-1, ids)
    return negentropy.to(logits.dtype) - (target.to(logits.dtype) * log_q).sum(-1)


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    topk: TopK | None,
    *,
    alpha: float,
    temperature: float,
    divergence: Divergence = "forward_kl",
) -> Tensor:
    """Return alpha tau^2 D + (1 - alpha) CE per position (Hinton et al. 2015); CE without topk.

    Where topk has no target, D is 0.

    Raises:
        MismatchError: see `require_expressible`; or the temperature was not stored.
    """
    ce = cross_entropy(logits, labels)
    if topk is None:
        return ce
    require_expressible(divergence, topk)
    if topk.num_sampled:
        value = sampled_kl(logits, topk, temperature)
    else:
        value = DIVERGENCES[divergence](*bucketed(logits, topk, temperature))
    value = value.masked_fill(~topk.has_target, 0.0)
    return alpha * temperature**2 * value + (1.0 - alpha) * ce
