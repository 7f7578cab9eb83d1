"""The reduction by Triton kernels against PyTorch's passes and float64: interpreted, on a GPU."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from pipeline.targets import reduce, reduce_torch
from pipeline.targets.reduce import Reduction
from pipeline.targets.topk import TopK
from tests.helpers import every_sample
from tests.triton_checks import interpret_fast, needs_triton, run_apart  # noqa: F401  # for the other process

TEMPERATURES = ((), (1.0,), (2.0,), (1.0, 2.0, 4.0), (0.5, 3.0))
VOCABULARIES = (5, 63, 64, 65, 300, 4096, 9001)


def logits_for_tests(rows: int, vocabulary: int, device: str) -> Tensor:
    """Ordinary rows; the first one with huge logits, the last one with -inf and equal values."""
    logits = torch.randn(rows, vocabulary, device=device) * 5
    logits[0] = logits[0] * 400 + 10_000
    logits[-1, ::3] = -torch.inf
    logits[-1, 1::3] = logits[-1, 1::3].round()
    return logits


def check_reduction(
    fused: Reduction,
    device: str,
    rows: int,
    ks: tuple[int, ...],
    vocabularies: tuple[int, ...] = VOCABULARIES,
) -> None:
    """Every vocabulary with every k, temperatures and sampling in turn."""
    cases = product(vocabularies, ks)
    for turn, (vocabulary, k) in enumerate(cases):
        temperatures = TEMPERATURES[turn % len(TEMPERATURES)]
        logits = logits_for_tests(rows, vocabulary, device)
        uniforms = torch.rand(rows, 6, device=device) if turn % 2 else None
        k = min(k, vocabulary)
        found = fused.reduce_rows(logits, k, temperatures, uniforms)
        plain = reduce_torch.reduce_rows(logits, k, temperatures, uniforms)
        check_against_float64(found, logits)
        for name in ("logprobs", "lse", "lse_tau", "entropy"):
            # Not of huge logits, of which the plain passes round a quotient: 0.0002 nats.
            here, there = getattr(found, name)[1:], getattr(plain, name)[1:]
            torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5, equal_nan=True)
        if uniforms is not None:
            check_sampled(found, logits, uniforms)


def check_against_float64(found: TopK, logits: Tensor) -> None:
    exact = logits.double()
    log_p = exact.log_softmax(-1)
    close = {"atol": 2e-5, "rtol": 1e-5}
    assert torch.equal(logits.gather(-1, found.ids), logits.topk(found.k).values)
    assert all(len(set(row.tolist())) == found.k for row in found.ids)
    torch.testing.assert_close(found.logprobs.double(), log_p.gather(-1, found.ids), **close)
    torch.testing.assert_close(found.lse.double(), exact.logsumexp(-1), atol=2e-5, rtol=1e-6)
    for column, tau in enumerate(found.temperatures):
        normaliser = (log_p / tau).logsumexp(-1)
        torch.testing.assert_close(found.lse_tau[:, column].double(), normaliser, **close)
    finite = torch.isfinite(logits).all(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    torch.testing.assert_close(found.entropy[finite].double(), entropy[finite], **close)
    # 0 * inf, in the plain passes, too: capture refuses such a teacher.
    assert bool(found.entropy[~finite].isnan().all())


def check_sampled(found: TopK, logits: Tensor, uniforms: Tensor) -> None:
    """The ids that one cumulative sum in float64 gives, or their neighbours within rounding."""
    log_p = logits.double().log_softmax(-1)
    uniforms = uniforms.sort(-1).values
    outside = log_p.exp().scatter(-1, found.ids, 0.0)
    running = outside.cumsum(-1)
    share = running / running[:, -1:]
    before = share - outside / running[:, -1:]
    ids = every_sample(found)
    has_mass = (running[:, -1:] > 1e-30).expand(ids.shape)
    inside = (before.gather(-1, ids) <= uniforms + 1e-5) & (
        uniforms <= share.gather(-1, ids) + 1e-5
    )
    possible = outside.gather(-1, ids) > 0
    assert bool(((inside & possible) | ~has_mass).all())
    if found.temperatures:
        expected = log_p.gather(-1, found.sampled_ids)
        torch.testing.assert_close(found.sampled_logprobs.double(), expected, atol=2e-5, rtol=1e-5)


def check_extremes(fused: Reduction, device: str) -> None:
    """Rows without a finite logit, a view of wider rows, ids of equal logits, no mass to sample."""
    rows = torch.randn(4, 300, device=device)
    rows[0] = -torch.inf
    rows[1, 3] = torch.inf
    rows[2, 3] = torch.nan
    found = fused.reduce_rows(rows, 4, (1.0, 2.0), None)
    plain = reduce_torch.reduce_rows(rows, 4, (1.0, 2.0), None)
    for topk in (found, plain):
        assert topk.lse.isnan().tolist() == [True, True, True, False]
        assert bool(((topk.ids >= 0) & (topk.ids < 300)).all())
    wide = torch.randn(3, 304, device=device)
    view = fused.reduce_rows(wide[:, :301], 5, (2.0,), None)
    copied = fused.reduce_rows(wide[:, :301].contiguous(), 5, (2.0,), None)
    assert torch.equal(view.ids, copied.ids)
    torch.testing.assert_close(view.entropy, copied.entropy)  # sums in another order, on a GPU
    equal = fused.reduce_rows(torch.zeros(1, 1000, device=device), 7, (), None)
    assert equal.ids.tolist() == [list(range(7))]
    logits = torch.full((1, 200), -torch.inf, device=device)
    logits[0, [3, 64, 130]] = torch.tensor([2.0, 0.0, 0.0], device=device)
    uniforms = torch.tensor([[0.0, 1e-8, 0.4999, 0.5001, 1 - 2**-24]], device=device)
    drawn = fused.reduce_rows(logits, 1, (), uniforms)
    assert drawn.ids.tolist() == [[3]]
    assert every_sample(drawn).tolist() == [[64, 64, 64, 130, 130]]
    assert fused.reduce_rows(wide, 9, (), None, 0.5).is_kept.sum(-1).amax() < 304


@needs_triton
def test_interpreted_kernels_equal_the_plain_passes() -> None:
    run_apart(
        "tests.targets.test_reduce_kernels",
        "from pipeline.targets import reduce_triton; interpret_fast(); torch.manual_seed(0); "
        "check_reduction(reduce_triton, 'cpu', 2, (3,)); "
        "check_reduction(reduce_triton, 'cpu', 3, (0, 20), (65, 9001)); "
        "check_reduction(reduce_triton, 'cpu', 2, (300,), (4096,)); "
        "check_extremes(reduce_triton, 'cpu')",
        TRITON_INTERPRET="1",
    )


@pytest.mark.gpu
def test_kernels_equal_the_plain_passes_on_a_gpu() -> None:
    from pipeline.targets import reduce_triton

    assert reduce.reduction_for(torch.device("cuda")) is reduce_triton
    sizes = (*VOCABULARIES, 49_152, 151_665)
    check_reduction(reduce_triton, "cuda", 33, (0, 1, 3, 64, 200, 300), sizes)
    check_extremes(reduce_triton, "cuda")


def test_a_cpu_takes_the_plain_passes() -> None:
    assert reduce.reduction_for(torch.device("cpu")) is reduce_torch
