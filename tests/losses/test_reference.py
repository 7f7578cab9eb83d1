from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.losses.reference import (
    cross_entropy,
    distillation_loss,
    full_kl,
    sampled_kl,
    tail_bucket_kl,
)
from pipeline.topk import TopK, top_k_from_logits

TAUS = (1.0, 2.0, 4.0)


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
    draws = torch.tensor(outside)[:, None]  # one position for each possible draw
    every = replace(
        topk.map(lambda t: t.expand(len(outside), *t.shape[1:])),
        draw_ids=draws,
        draw_logprobs=log_p.expand(len(outside), -1).gather(-1, draws),
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
