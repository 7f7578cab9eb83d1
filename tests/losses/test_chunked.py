"""The fast loss against its plain twin, value and gradient."""

from __future__ import annotations

import pytest
import torch

from pipeline.losses.chunked import distillation_loss_sums
from pipeline.losses.reference import cross_entropy, distillation_loss, sampled_kl, tail_bucket_kl
from pipeline.topk import top_k_from_logits

TAUS = (1.0, 2.0, 4.0)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(
    ("vocabulary", "k", "draws"),
    [(130, 7, 0), (40, 40, 0), (40, 1, 0), (130, 7, 9), (130, 0, 20)],
)
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_equals_the_plain_form(
    tau: float, vocabulary: int, k: int, draws: int, alpha: float
) -> None:
    n, size = 23, 12
    topk = top_k_from_logits(torch.randn(n, vocabulary) * 3, k, TAUS, torch.rand(n, draws))
    hidden = torch.randn(n, size, requires_grad=True)
    weight = torch.randn(vocabulary + 5, size, requires_grad=True)  # more rows than valid ids
    labels = torch.randint(0, vocabulary, (n,))
    sums = distillation_loss_sums(
        hidden, weight, labels, topk, alpha=alpha, temperature=tau, chunk=10
    )
    logits = hidden @ weight.T
    plain = distillation_loss(logits, labels, topk, alpha=alpha, temperature=tau).sum()
    torch.testing.assert_close(sums.total, plain, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(sums.ce, cross_entropy(logits, labels).sum(), atol=1e-4, rtol=1e-6)
    kl = (sampled_kl if draws else tail_bucket_kl)(logits, topk, tau).sum()
    torch.testing.assert_close(sums.kl, kl, atol=1e-4, rtol=1e-6)
    expected = torch.autograd.grad(plain / n, (hidden, weight))
    for found, wanted in zip(
        torch.autograd.grad(sums.total / n, (hidden, weight)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    hidden = torch.randn(9, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (9,))
    sums = distillation_loss_sums(hidden, weight, labels, None, alpha=0.9, temperature=2.0, chunk=4)
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(sums.total, plain)
    assert float(sums.kl) == 0.0
    expected = torch.autograd.grad(plain, (hidden, weight))
    for found, wanted in zip(
        torch.autograd.grad(sums.total, (hidden, weight)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    """A student so sure of the kept ids that its tail underflows, and one so sure of the tail."""
    topk = top_k_from_logits(torch.randn(2, 30), 4, TAUS)
    for direction in (200.0, -200.0):
        logits = torch.zeros(2, 30).scatter(-1, topk.ids, direction)
        hidden = logits.clone().requires_grad_()
        sums = distillation_loss_sums(
            hidden, torch.eye(30), torch.tensor([0, 1]), topk, alpha=1.0, temperature=1.0
        )
        (grad,) = torch.autograd.grad(sums.total, hidden)
        assert bool(torch.isfinite(sums.total))
        assert bool(torch.isfinite(grad).all())


def test_bfloat16_factors_accumulate_in_float32() -> None:
    n, size, vocabulary = 16, 64, 500
    topk = top_k_from_logits(torch.randn(n, vocabulary) * 3, 16, TAUS)
    hidden = torch.randn(n, size).bfloat16().float()
    weight = torch.randn(vocabulary, size).bfloat16().float()
    labels = torch.randint(0, vocabulary, (n,))
    half, full = (
        distillation_loss_sums(
            hidden, weight, labels, topk, alpha=0.5, temperature=1.0, dtype=dtype
        ).total
        for dtype in (torch.bfloat16, torch.float32)
    )
    # The factors are exact in bfloat16, so only a rounded PRODUCT could make a difference.
    torch.testing.assert_close(half, full, rtol=1e-5, atol=1e-3)
