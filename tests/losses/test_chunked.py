"""The fast loss against its plain twin, value and gradient."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from pipeline.config.train_params import Divergence
from pipeline.data.packing import IGNORE
from pipeline.errors import MismatchError
from pipeline.losses import chunked, kernels_torch
from pipeline.losses.chunked import LossSums, distillation_loss_sums
from pipeline.losses.divergences import DIVERGENCES
from pipeline.losses.reference import (
    bucketed,
    cross_entropy,
    distillation_loss,
    sampled_kl,
    transformed,
)
from pipeline.model.logit_transform import LogitTransform
from pipeline.targets.reduce import top_k_from_logits
from pipeline.targets.topk import TopK

TAUS = (1.0, 2.0, 4.0)
NAMES = get_args(Divergence)


def assert_equals_plain(
    sums: LossSums,
    parameters: tuple[Tensor, ...],
    logits: Tensor,
    labels: Tensor,
    topk: TopK | None,
    alpha: float,
    tau: float,
    divergence: Divergence = "forward_kl",
) -> None:
    plain = distillation_loss(
        logits, labels, topk, alpha=alpha, temperature=tau, divergence=divergence
    ).sum()
    torch.testing.assert_close(sums.total, plain, atol=1e-4, rtol=2e-6)
    torch.testing.assert_close(sums.ce, cross_entropy(logits, labels).sum(), atol=1e-4, rtol=1e-6)
    if topk is not None:
        value = (
            sampled_kl(logits, topk, tau)
            if topk.num_sampled
            else DIVERGENCES[divergence](*bucketed(logits, topk, tau))
        )
        value = value[topk.has_target].sum()
        torch.testing.assert_close(sums.divergence, value, atol=1e-4, rtol=2e-6)
    n = len(labels)
    expected = torch.autograd.grad(plain / n, parameters)
    found = torch.autograd.grad(sums.total / n, parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(
    ("vocabulary", "k", "num_sampled"),
    [(130, 7, 0), (40, 40, 0), (40, 1, 0), (130, 7, 9), (130, 0, 20)],
)
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_equals_the_plain_form(
    tau: float, vocabulary: int, k: int, num_sampled: int, alpha: float
) -> None:
    n, size = 23, 12
    topk = top_k_from_logits(torch.randn(n, vocabulary) * 3, k, TAUS, torch.rand(n, num_sampled))
    hidden = torch.randn(n, size, requires_grad=True)
    weight = torch.randn(vocabulary + 5, size, requires_grad=True)  # more rows than valid ids
    labels = torch.randint(0, vocabulary, (n,))
    sums = distillation_loss_sums(
        hidden, weight, labels, topk, alpha=alpha, temperature=tau, chunk=10
    )
    assert_equals_plain(sums, (hidden, weight), hidden @ weight.T, labels, topk, alpha, tau)


@pytest.mark.parametrize("tau", [1.0, 2.0, 0.4, 1.5])
@pytest.mark.parametrize(("vocabulary", "k", "more"), [(130, 7, 5), (40, 40, 5), (40, 40, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_equals_its_plain_form(
    name: Divergence, vocabulary: int, k: int, more: int, tau: float
) -> None:
    n, size = 23, 12
    topk = top_k_from_logits(torch.randn(n, vocabulary) * 3, k, (2.0, 0.4, 1.5))
    hidden = torch.randn(n, size, requires_grad=True)
    weight = torch.randn(vocabulary + more, size, requires_grad=True)
    labels = torch.randint(0, vocabulary, (n,))
    sums = distillation_loss_sums(
        hidden, weight, labels, topk, alpha=0.6, temperature=tau, divergence=name, chunk=10
    )
    logits = hidden @ weight.T
    assert_equals_plain(sums, (hidden, weight), logits, labels, topk, 0.6, tau, name)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("num_sampled", [0, 9])
@pytest.mark.parametrize("k", [7, 40])
@pytest.mark.parametrize("name", NAMES)
def test_cut_ids_and_positions_without_a_target(
    name: Divergence, k: int, num_sampled: int, tau: float
) -> None:
    if num_sampled and name != "forward_kl":
        return
    n, size = 23, 12
    uniforms = torch.rand(n, num_sampled)
    whole = top_k_from_logits(torch.randn(n, 40) * 3, k, (2.0,), uniforms, 0.8)
    there = torch.arange(n) % 3 > 0
    index = there.nonzero()[:, 0]
    topk = whole[index].spread(index, (n,))
    assert 0 < int(topk.is_kept.sum()) < k * len(index)
    hidden = torch.randn(n, size, requires_grad=True)
    weight = torch.randn(45, size, requires_grad=True)
    labels = torch.randint(0, 40, (n,))

    def sums_of(target: TopK, rows: Tensor, share: float) -> LossSums:
        return distillation_loss_sums(
            hidden[rows],
            weight,
            labels[rows],
            target,
            alpha=0.6,
            temperature=tau,
            divergence=name,
            target_weight=share,
            chunk=10,
        )

    every = torch.arange(n)
    logits = hidden @ weight.T
    assert_equals_plain(
        sums_of(topk, every, 1.0), (hidden, weight), logits, labels, topk, 0.6, tau, name
    )
    # The divergence counts where there is a target, and nowhere else; a cut id is in the bucket.
    found, only = sums_of(topk, every, 1.5), sums_of(whole[index], index, 1.5)
    torch.testing.assert_close(found.divergence, only.divergence)
    elsewhere = cross_entropy(logits, labels)[~there].sum()
    torch.testing.assert_close(found.total, only.total + 0.4 * elsewhere)
    expected = 0.6 * 1.5 * tau**2 * only.divergence + 0.4 * found.ce
    torch.testing.assert_close(found.total, expected)
    if k == 7 and not num_sampled:  # as if fewer ids had been asked for
        row = int(index[0])
        number = int(topk.is_kept[row].sum())
        short = sums_of(whole.prefix(number)[row : row + 1], torch.tensor([row]), 1.0)
        cut = sums_of(topk[row : row + 1], torch.tensor([row]), 1.0)
        torch.testing.assert_close(cut.divergence, short.divergence)
        torch.testing.assert_close(cut.total, short.total)


@pytest.mark.parametrize("tau", TAUS)
def test_rows_in_several_blocks(tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two rows that divide neither the chunk nor the last one."""
    monkeypatch.setattr(kernels_torch, "_BYTES_AT_ONCE_ON_CPU", 2 * 4 * 50)
    topk = top_k_from_logits(torch.randn(17, 50) * 3, 7, TAUS)
    hidden = torch.randn(17, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (17,))
    sums = distillation_loss_sums(hidden, weight, labels, topk, alpha=0.6, temperature=tau, chunk=7)
    assert_equals_plain(sums, (hidden, weight), hidden @ weight.T, labels, topk, 0.6, tau)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("num_sampled", [0, 9])
@pytest.mark.parametrize(
    "transform", [LogitTransform(0.3), LogitTransform(1.0, 2.0), LogitTransform(3.0, 5.0)], ids=str
)
def test_scaled_and_capped_logits(transform: LogitTransform, num_sampled: int, tau: float) -> None:
    topk = top_k_from_logits(torch.randn(17, 50) * 3, 7, TAUS, torch.rand(17, num_sampled))
    hidden = torch.randn(17, 8, requires_grad=True)
    weight = torch.randn(55, 8, requires_grad=True)
    labels = torch.randint(0, 50, (17,))
    sums = distillation_loss_sums(
        hidden, weight, labels, topk, alpha=0.6, temperature=tau, transform=transform, chunk=7
    )
    logits = transformed(hidden @ weight.T, transform)
    torch.testing.assert_close(transform.apply_((hidden @ weight.T).detach()), logits.detach())
    assert_equals_plain(sums, (hidden, weight), logits, labels, topk, 0.6, tau)


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
def test_the_loss_scale_reaches_gradients_before_they_are_rounded(loss_scale: float) -> None:
    """Hidden states in float16 whose unscaled gradients are below float16's least number, 6e-8."""
    hidden = torch.randn(5, 8, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(20, 8) * 1e-9
    labels = torch.randint(0, 20, (5,))
    sums = distillation_loss_sums(
        hidden, weight, labels, None, alpha=0.0, temperature=1.0, dtype=torch.float32
    )
    (found,) = torch.autograd.grad(sums.total * loss_scale, hidden)
    exact = hidden.detach().float().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact @ weight.T, labels, reduction="sum")
    (wanted,) = torch.autograd.grad(loss * loss_scale, exact)
    assert found.dtype == torch.float16
    if loss_scale == 1.0:
        assert not found.any()
    else:
        torch.testing.assert_close(found.float(), wanted, rtol=0.03, atol=1e-7)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    hidden = torch.randn(9, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (9,))
    sums = distillation_loss_sums(hidden, weight, labels, None, alpha=0.9, temperature=2.0, chunk=4)
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(sums.total, plain)
    assert float(sums.divergence) == 0.0
    expected = torch.autograd.grad(plain, (hidden, weight))
    for found, wanted in zip(
        torch.autograd.grad(sums.total, (hidden, weight)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_stay_finite(name: Divergence) -> None:
    """A student so sure of the kept ids that its tail underflows, and one so sure of the tail."""
    topk = top_k_from_logits(torch.randn(2, 30), 4, TAUS)
    for direction in (200.0, -200.0):
        logits = torch.zeros(2, 30).scatter(-1, topk.ids, direction)
        hidden = logits.clone().requires_grad_()
        sums = distillation_loss_sums(
            hidden,
            torch.eye(30),
            torch.tensor([0, 1]),
            topk,
            alpha=1.0,
            temperature=1.0,
            divergence=name,
        )
        (grad,) = torch.autograd.grad(sums.total, hidden)
        assert bool(torch.isfinite(sums.total))
        assert bool(torch.isfinite(grad).all())


def test_a_tail_that_underflows_keeps_its_digits() -> None:
    """q_t = 26 exp(-200) is 0 in float32, log q_t is not: the value is that of float64."""
    topk = top_k_from_logits(torch.randn(2, 30), 4, TAUS)
    logits = torch.zeros(2, 30).scatter(-1, topk.ids, 200.0)
    hidden = logits.clone().requires_grad_()
    labels = torch.tensor([0, 1])
    sums = distillation_loss_sums(hidden, torch.eye(30), labels, topk, alpha=1.0, temperature=1.0)
    (grad,) = torch.autograd.grad(sums.total, hidden)
    exact = logits.double().requires_grad_()
    plain = distillation_loss(exact, labels, topk, alpha=1.0, temperature=1.0).sum()
    (exact_grad,) = torch.autograd.grad(plain, exact)
    torch.testing.assert_close(sums.total.double(), plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-7)


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


def test_bfloat16_inputs_get_bfloat16_gradients_of_a_float32_loss() -> None:
    topk = top_k_from_logits(torch.randn(16, 500) * 3, 16, TAUS)
    hidden = torch.randn(16, 64).bfloat16().requires_grad_()
    weight = torch.randn(500, 64).bfloat16().requires_grad_()
    labels = torch.randint(0, 500, (16,))
    sums = distillation_loss_sums(
        hidden, weight, labels, topk, alpha=0.5, temperature=2.0, dtype=torch.bfloat16, chunk=5
    )
    wide = tuple(t.detach().float().requires_grad_() for t in (hidden, weight))
    logits = wide[0] @ wide[1].T
    plain = distillation_loss(logits, labels, topk, alpha=0.5, temperature=2.0).sum()
    assert sums.total.dtype == torch.float32
    torch.testing.assert_close(sums.total, plain, rtol=1e-5, atol=1e-3)
    for found, exact in zip(
        torch.autograd.grad(sums.total, (hidden, weight)),
        torch.autograd.grad(plain, wide),
        strict=True,
    ):
        assert found.dtype == torch.bfloat16
        assert float((found.float() - exact).norm() / exact.norm()) < 0.01


def test_a_tied_matrix_gets_both_gradients() -> None:
    """The embedding is the head: what flows through the body and what the head itself asks for."""
    topk = top_k_from_logits(torch.randn(11, 60) * 3, 6, TAUS)
    embedding = torch.randn(60, 8, requires_grad=True)
    tokens, labels = torch.randint(0, 60, (2, 11))
    hidden = embedding[tokens].tanh()
    sums = distillation_loss_sums(
        hidden, embedding, labels, topk, alpha=0.5, temperature=2.0, chunk=4
    )
    logits = embedding[tokens].tanh() @ embedding.T
    assert_equals_plain(sums, (embedding,), logits, labels, topk, 0.5, 2.0)


def test_masked_positions_get_no_gradient_and_change_nothing() -> None:
    topk = top_k_from_logits(torch.randn(3, 9, 60).flatten(0, 1) * 3, 6, TAUS)
    hidden = torch.randn(27, 8, requires_grad=True)
    weight = torch.randn(60, 8, requires_grad=True)
    labels = torch.randint(0, 60, (27,)).masked_fill(torch.rand(27) < 0.4, IGNORE)
    wanted = labels != IGNORE
    sums = distillation_loss_sums(
        hidden[wanted], weight, labels[wanted], topk[wanted], alpha=0.5, temperature=1.0, chunk=4
    )
    logits = hidden @ weight.T
    ce = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(sums.ce, ce, atol=1e-4, rtol=1e-6)
    (grad,) = torch.autograd.grad(sums.total, hidden)
    assert not bool(grad[~wanted].any())
    assert bool(grad[wanted].any(-1).all())


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for every matrix product that the chunked loss makes."""
    made: list[object] = []
    multiply = chunked.matmul_float32

    def counted(*args, **options):  # type: ignore[no-untyped-def]
        made.append(args)
        return multiply(*args, **options)

    monkeypatch.setattr(chunked, "matmul_float32", counted)
    return made


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_no_product(frozen: str, products: list[object]) -> None:
    tensors = {"hidden": torch.randn(5, 8), "weight": torch.randn(60, 8)}
    (learned,) = (tensors[name].requires_grad_() for name in tensors if name != frozen)
    labels = torch.randint(0, 60, (5,))
    sums = distillation_loss_sums(
        tensors["hidden"], tensors["weight"], labels, None, alpha=0.5, temperature=1.0
    )
    assert len(products) == 2
    logits = tensors["hidden"] @ tensors["weight"].T
    assert_equals_plain(sums, (learned,), logits, labels, None, 0.5, 1.0)


def test_validation_costs_the_logits_alone(products: list[object]) -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(60, 8, requires_grad=True)
    labels = torch.randint(0, 60, (5,))
    with torch.no_grad():
        sums = distillation_loss_sums(hidden, weight, labels, None, alpha=0.5, temperature=1.0)
    assert len(products) == 1
    torch.testing.assert_close(sums.ce, cross_entropy(hidden @ weight.detach().T, labels).sum())


def test_draws_serve_forward_kl_alone() -> None:
    topk = top_k_from_logits(torch.randn(2, 12), 4, TAUS, torch.rand(2, 6))
    with pytest.raises(MismatchError, match=r"divergence=skew_kl .* 6 sampled ids"):
        distillation_loss_sums(
            torch.randn(2, 3),
            torch.randn(12, 3),
            torch.tensor([3, 7]),
            topk,
            alpha=0.5,
            temperature=1.0,
            divergence="skew_kl",
        )
