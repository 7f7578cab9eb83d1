from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from pipeline.config.train_params import Divergence
from pipeline.errors import MismatchError
from pipeline.losses.divergences import DIVERGENCES, LOG_ZERO, SKEW
from pipeline.losses.reference import (
    bucketed,
    cross_entropy,
    distillation_loss,
    full_kl,
    sampled_kl,
    tail_bucket_kl,
)
from pipeline.targets.reduce import top_k_from_logits
from pipeline.targets.topk import TopK

TAUS = (1.0, 2.0, 4.0)
NAMES = get_args(Divergence)
BOUNDS = [name for name in NAMES if name != "renormalised_kl"]


def topk_of(probabilities: list[list[float]], k: int) -> TopK:
    return top_k_from_logits(torch.tensor(probabilities).log(), k, TAUS)


@pytest.mark.parametrize("tau", TAUS)
def test_whole_vocabulary_equals_torch_kldivloss(tau: float) -> None:
    teacher, start = torch.randn(9, 40) * 2, torch.randn(9, 40) * 2
    topk = top_k_from_logits(teacher.clone(), 40, TAUS)
    ours = start.clone().requires_grad_()
    theirs = start.clone().requires_grad_()
    value = tail_bucket_kl(ours, topk, tau).mean()
    expected = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(
        (theirs / tau).log_softmax(-1), (teacher / tau).log_softmax(-1)
    )
    (grad,) = torch.autograd.grad(value, ours)
    (expected_grad,) = torch.autograd.grad(expected, theirs)
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=0)


def test_worked_by_hand() -> None:
    # p = (1/2, 1/4, 1/8, 1/8), q = (1/4, 1/4, 1/4, 1/4), T = {0, 1}:
    # 1/2 log 2 + 1/4 log 1 + 1/4 log((1/4) / (1/2)) = 1/4 log 2
    topk = topk_of([[0.5, 0.25, 0.125, 0.125]], k=2)
    value = tail_bucket_kl(torch.zeros(1, 4), topk, 1.0)
    torch.testing.assert_close(value, torch.tensor([0.25 * math.log(2)]))
    # the whole vocabulary: 1/2 log 2 - 2 * 1/8 log 2 = 1/4 log 2 as well, since both tails are flat
    full = full_kl(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), torch.zeros(1, 4), 1.0)
    torch.testing.assert_close(full, value)


@pytest.mark.parametrize("tau", TAUS)
def test_between_zero_and_the_full_divergence(tau: float) -> None:
    teacher, student = torch.randn(200, 120) * 4, torch.randn(200, 120) * 4
    topk = top_k_from_logits(teacher.clone(), 6, TAUS)
    value, full = tail_bucket_kl(student, topk, tau), full_kl(teacher, student, tau)
    assert bool((value >= -1e-6).all())
    assert bool((value <= full + 1e-5).all())
    # the chain rule: what is missing is p_t KL(p|tail || q|tail)
    log_p = (teacher / tau).log_softmax(-1).scatter(-1, topk.ids, -torch.inf)
    log_q = (student / tau).log_softmax(-1).scatter(-1, topk.ids, -torch.inf)
    tail_mass = log_p.exp().sum(-1)
    inside = log_p - log_p.logsumexp(-1, True) - log_q + log_q.logsumexp(-1, True)
    conditional = (log_p.exp() * inside.nan_to_num()).sum(-1) / tail_mass
    torch.testing.assert_close(full - value, tail_mass * conditional, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tau", TAUS)
def test_gradient_is_q_minus_p_on_and_scaled_q_off_the_kept_ids(tau: float) -> None:
    teacher, student = torch.randn(3, 30).double(), torch.randn(3, 30).double().requires_grad_()
    topk = top_k_from_logits(teacher.float(), 5, TAUS)
    (grad,) = torch.autograd.grad(tail_bucket_kl(student, topk, tau).sum(), student)
    q = (student / tau).softmax(-1).detach()
    log_p, tail = topk.target(tau)
    outside = torch.ones_like(q).scatter(-1, topk.ids, 0.0)
    q_tail = (q * outside).sum(-1, keepdim=True)
    expected = q * (1 - tail[:, None] / q_tail)
    expected = expected.scatter(-1, topk.ids, (q.gather(-1, topk.ids) - log_p.exp()))
    torch.testing.assert_close(grad * tau, expected, atol=1e-6, rtol=1e-5)


def test_finite_differences_in_float64() -> None:
    topk = top_k_from_logits(torch.randn(2, 12), 4, TAUS)
    labels = torch.tensor([3, 7])
    logits = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)

    def loss(z: Tensor) -> Tensor:
        return distillation_loss(z, labels, topk, alpha=0.6, temperature=2.0)

    assert torch.autograd.gradcheck(loss, (logits,))


def test_cross_entropy_equals_torch() -> None:
    logits, labels = torch.randn(5, 9), torch.tensor([0, 8, 3, 3, 1])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


def test_ids_the_teacher_lacks_count_as_tail() -> None:
    """A student with more rows than the tokenizer has ids: 151,936 against 151,665."""
    teacher = torch.randn(4, 10)
    topk = top_k_from_logits(teacher.clone(), 3, TAUS)
    wide = torch.randn(4, 16)
    padded = torch.cat((teacher, torch.full((4, 6), -torch.inf)), dim=-1)
    value = tail_bucket_kl(wide, topk, 1.0)
    log_p, log_q = padded.log_softmax(-1), wide.log_softmax(-1)
    full = torch.where(log_p.isfinite(), log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    assert bool((value <= full + 1e-6).all())
    everything = top_k_from_logits(teacher.clone(), 10, TAUS)
    torch.testing.assert_close(tail_bucket_kl(wide, everything, 1.0), full)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("k", [0, 5])
def test_sampled_loss_and_gradient_are_unbiased(tau: float, k: int) -> None:
    """The expectation over one draw, summed over every id that can be drawn: no chance left."""
    teacher = torch.randn(1, 40) * 2
    topk = top_k_from_logits(teacher.clone(), k, TAUS)
    outside = [v for v in range(40) if v not in topk.ids[0].tolist()]
    log_p = teacher.log_softmax(-1)
    chances = (log_p[0, outside] - log_p[0, outside].logsumexp(0)).exp()
    drawn = torch.tensor(outside)[:, None]  # one position for each possible draw
    every = replace(
        topk.map(lambda t: t.expand(len(outside), *t.shape[1:])),
        sampled_ids=drawn,
        sampled_counts=torch.ones_like(drawn),
        sampled_logprobs=log_p.expand(len(outside), -1).gather(-1, drawn),
        num_sampled=1,
    )
    student = torch.randn(1, 40)
    ours = student.expand(len(outside), -1).clone().requires_grad_()
    (grad,) = torch.autograd.grad((chances * sampled_kl(ours, every, tau)).sum(), ours)
    theirs = student.clone().requires_grad_()
    full = full_kl(teacher, theirs, tau).sum()
    (full_grad,) = torch.autograd.grad(full, theirs)
    value = (chances * sampled_kl(ours, every, tau)).sum()
    torch.testing.assert_close(value, full, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad.sum(0, keepdim=True), full_grad, atol=1e-6, rtol=1e-4)


def test_finite_differences_of_the_sampled_loss() -> None:
    topk = top_k_from_logits(torch.randn(2, 12), 4, TAUS, torch.rand(2, 6))
    labels = torch.tensor([3, 7])
    logits = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)

    def loss(z: Tensor) -> Tensor:
        return distillation_loss(z, labels, topk, alpha=0.6, temperature=2.0)

    assert torch.autograd.gradcheck(loss, (logits,))


def test_every_divergence_has_a_name_in_the_params() -> None:
    assert tuple(DIVERGENCES) == NAMES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # p = (1/2, 1/4, 1/8, 1/8), q = (1/8, 1/8, 3/8, 3/8), T = {0, 1}: bucket 1/4 against 3/4
        ("forward_kl", math.log(4) / 2 + math.log(2) / 4 + math.log(1 / 3) / 4),
        ("renormalised_kl", 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)),
        ("reverse_kl", math.log(1 / 4) / 8 + math.log(1 / 2) / 8 + 3 / 4 * math.log(3)),
        (
            "jensen_shannon",  # m = (5/16, 3/16, 1/2)
            (math.log(8 / 5) / 2 + math.log(4 / 3) / 4 + math.log(1 / 2) / 4) / 2
            + (math.log(2 / 5) / 8 + math.log(2 / 3) / 8 + 3 / 4 * math.log(3 / 2)) / 2,
        ),
        (
            "skew_kl",  # m = p / 10 + 9 q / 10
            math.log(0.5 / 0.1625) / 2 + math.log(0.25 / 0.1375) / 4 + math.log(0.25 / 0.7) / 4,
        ),
        (
            "skew_reverse_kl",  # m = q / 10 + 9 p / 10
            math.log(0.125 / 0.4625) / 8
            + math.log(0.125 / 0.2375) / 8
            + math.log(0.75 / 0.3) * 3 / 4,
        ),
        ("total_variation", (3 / 8 + 1 / 8 + 1 / 2) / 2),
    ],
)
def test_divergences_worked_by_hand(name: Divergence, expected: float) -> None:
    topk = topk_of([[0.5, 0.25, 0.125, 0.125]], k=2)
    logits = torch.tensor([[0.125, 0.125, 0.375, 0.375]]).log()
    value = DIVERGENCES[name](*bucketed(logits, topk, 1.0))
    torch.testing.assert_close(value, torch.tensor([expected]))


def over_whole_vocabulary(name: Divergence, teacher: Tensor, student: Tensor, tau: float) -> Tensor:
    empty = torch.full((len(teacher), 1), LOG_ZERO)
    return DIVERGENCES[name](
        *(torch.cat(((z / tau).log_softmax(-1), empty), -1) for z in (teacher, student))
    )


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("name", BOUNDS)
def test_a_bucket_never_raises_a_divergence(name: Divergence, tau: float) -> None:
    teacher, student = torch.randn(200, 120) * 4, torch.randn(200, 120) * 4
    topk = top_k_from_logits(teacher.clone(), 6, TAUS)
    value = DIVERGENCES[name](*bucketed(student, topk, tau))
    full = over_whole_vocabulary(name, teacher, student, tau)
    assert bool((value >= -2e-6).all())
    assert bool((value <= full + 1e-5).all())
    assert bool((value < 0.99 * full).any())  # a bound, not the thing itself
    # Spread alike outside T, nothing is lost.
    outside = torch.ones_like(student).scatter(-1, topk.ids, 0.0)
    alike = torch.where(outside > 0, teacher + 2.0, student)
    value = DIVERGENCES[name](*bucketed(alike, topk, tau))
    full = over_whole_vocabulary(name, teacher, alike, tau)
    torch.testing.assert_close(value, full, atol=2e-5, rtol=1e-4)


def test_renormalising_sees_no_mass_outside_the_kept_ids() -> None:
    teacher = torch.randn(50, 30) * 2
    topk = top_k_from_logits(teacher.clone(), 5, TAUS)
    outside = torch.ones_like(teacher).scatter(-1, topk.ids, 0.0)
    lost = teacher + 5.0 * outside  # nearly all of q outside T
    log_p, log_q = bucketed(lost, topk, 1.0)
    zero = DIVERGENCES["renormalised_kl"](log_p, log_q)
    torch.testing.assert_close(zero, torch.zeros(50), atol=1e-6, rtol=0)
    assert bool((DIVERGENCES["forward_kl"](log_p, log_q) > 0.1).all())


SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda p, q: -p / q,
    "reverse_kl": lambda p, q: (q / p).log() + 1,
    "jensen_shannon": lambda p, q: (2 * q / (p + q)).log() / 2,
    "skew_kl": lambda p, q: -(1 - SKEW) * p / (SKEW * p + (1 - SKEW) * q),
    "skew_reverse_kl": lambda p, q: (
        (q / (SKEW * q + (1 - SKEW) * p)).log() + 1 - SKEW * q / (SKEW * q + (1 - SKEW) * p)
    ),
    "total_variation": lambda p, q: (q - p).sign() / 2,
}


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("name", BOUNDS)
def test_gradients_are_those_the_docstrings_give(name: Divergence, tau: float) -> None:
    topk = top_k_from_logits(torch.randn(6, 30) * 2, 5, TAUS)
    student = (torch.randn(6, 30, dtype=torch.float64) * 2).requires_grad_()
    log_p, log_q = bucketed(student, topk, tau)
    (grad,) = torch.autograd.grad(DIVERGENCES[name](log_p, log_q).sum(), student)
    p, q = log_p.exp(), log_q.detach().exp()
    pull = SLOPES[name](p, q)
    pull = pull - (q * pull).sum(-1, keepdim=True)
    whole_q = (student.detach() / tau).softmax(-1)
    expected = whole_q * pull[:, -1:].expand(-1, 30).scatter(-1, topk.ids, pull[:, :-1])
    torch.testing.assert_close(grad * tau, expected)


def test_gradient_of_the_renormalised_kl() -> None:
    topk = top_k_from_logits(torch.randn(6, 30) * 2, 5, TAUS)
    student = (torch.randn(6, 30, dtype=torch.float64) * 2).requires_grad_()
    value = DIVERGENCES["renormalised_kl"](*bucketed(student, topk, 2.0))
    (grad,) = torch.autograd.grad(value.sum(), student)
    log_p, _ = topk.target(2.0)
    q = (student.detach() / 2.0).gather(-1, topk.ids).softmax(-1)
    expected = torch.zeros_like(grad).scatter(-1, topk.ids, q - log_p.double().softmax(-1))
    torch.testing.assert_close(grad * 2.0, expected)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("k", [4, 12])
@pytest.mark.parametrize("name", NAMES)
def test_finite_differences_of_every_divergence(name: Divergence, k: int, tau: float) -> None:
    """K = 12 keeps all the teacher's ids; the student has two more."""
    topk = top_k_from_logits(torch.randn(2, 12), k, TAUS)
    logits = torch.randn(2, 14, dtype=torch.float64, requires_grad=True)

    def loss(z: Tensor) -> Tensor:
        return DIVERGENCES[name](*bucketed(z, topk, tau))

    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_bucket_on_both_sides_leaves_the_full_divergence(name: Divergence) -> None:
    teacher = torch.randn(20, 15) * 3
    student = (torch.randn(20, 15) * 3).requires_grad_()
    topk = top_k_from_logits(teacher.clone(), 15, TAUS)
    value = DIVERGENCES[name](*bucketed(student, topk, 2.0))
    (grad,) = torch.autograd.grad(value.sum(), student, retain_graph=True)
    full = over_whole_vocabulary(name, teacher, student, 2.0)
    (full_grad,) = torch.autograd.grad(full.sum(), student)
    torch.testing.assert_close(value, full, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(grad, full_grad, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "forward_kl"])
def test_draws_serve_forward_kl_alone(name: Divergence) -> None:
    topk = top_k_from_logits(torch.randn(2, 12), 4, TAUS, torch.rand(2, 6))
    with pytest.raises(MismatchError, match=rf"divergence={name} .* 6 sampled ids .* forward_kl"):
        distillation_loss(
            torch.randn(2, 12),
            torch.tensor([3, 7]),
            topk,
            alpha=0.5,
            temperature=1.0,
            divergence=name,
        )
