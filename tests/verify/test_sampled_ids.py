"""Drawn ids as a sample: honest sampled ids pass, and each known fault fails, without equal ids."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from pipeline.targets.block_search import sample_by_inversion
from pipeline.targets.selection import count_distinct
from pipeline.verify.sampled_ids import fit_tests, sample_sums, sampled_overlap
from tests.verify.faults import SAMPLING_FAULTS

ROWS, LENGTH, VOCABULARY = 20, 32, 300
HALF = 0.1  # noise of log-probabilities, nats; bfloat16's on SmolLM2 is 0.05


def weights_of(seed: int, kept: int, vocabulary: int = VOCABULARY) -> Tensor:
    """Distributions from peaked to flat, 0 at the most probable `kept` ids."""
    generator = torch.Generator().manual_seed(seed)
    n = ROWS * LENGTH
    logits = torch.randn(n, vocabulary, generator=generator)
    p = (logits * 4 * torch.rand(n, 1, generator=generator)).softmax(-1)
    return p.scatter(-1, p.topk(kept).indices, 0.0)


def verdicts(live: Tensor, ids: Tensor) -> dict[str, bool]:
    place = torch.arange(len(live))
    sums = sample_sums(live, *count_distinct(ids), ids.shape[-1])
    tests = fit_tests(sums, place // LENGTH, place % LENGTH)
    return {test.name: test.passed for test in tests}


@pytest.mark.parametrize("kept", [0, 32])
@pytest.mark.parametrize("num_sampled", [1, 16, 50])
def test_honest_draws_pass(num_sampled: int, kept: int) -> None:
    """20 caches each; by design 4 in a million fail."""
    for seed in range(20):
        weights = weights_of(seed, kept, vocabulary=80)
        ids = sample_by_inversion(weights, torch.rand(len(weights), num_sampled))
        assert all(verdicts(weights, ids).values()), seed


@pytest.mark.parametrize("noise", [0.0, HALF])
@pytest.mark.parametrize("kept", [0, 32])
@pytest.mark.parametrize("num_sampled", [16, 50])
@pytest.mark.parametrize("fault", [None, *SAMPLING_FAULTS])
def test_faults_fail_by_their_distribution(
    fault: str | None, num_sampled: int, kept: int, noise: float
) -> None:
    weights = weights_of(0, kept)
    uniforms = torch.rand(ROWS, LENGTH, num_sampled)
    draw: Callable[[Tensor, Tensor], Tensor] = SAMPLING_FAULTS.get(
        fault or "", lambda w, u: sample_by_inversion(w, u.flatten(0, 1))
    )
    ids = draw(weights, uniforms)
    live = weights * (noise * torch.randn_like(weights)).exp()
    assert all(verdicts(live, ids).values()) is (fault is None)


def test_moments_are_those_of_the_distribution() -> None:
    """Against the mean and variance over every sample of three draws from four ids."""
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1])
    samples = torch.cartesian_prod(*(torch.arange(4),) * 3)
    chance = weights[samples].prod(-1).double()
    sums = sample_sums(weights.expand(len(samples), -1) * 7.0, *count_distinct(samples), 3)
    for name in ("surprise", "pairs", "place"):
        values = getattr(sums, name)
        mean = (chance * values).sum()
        variance = (chance * (values - mean).square()).sum()
        expected = sums.pairs_mean[0] if name == "pairs" else torch.zeros(()).double()
        torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            variance, getattr(sums, f"{name}_variance")[0], rtol=1e-5, atol=0
        )
    fourth = (chance * sums.place**4).sum()
    cumulant = fourth - 3 * sums.place_variance[0] ** 2
    torch.testing.assert_close(cumulant, sums.place_cumulant[0], rtol=1e-4, atol=1e-7)
    by_hand = [sum(a == b for a, b in combinations(ids, 2)) for ids in samples.tolist()]
    assert sums.pairs.tolist() == by_hand


def test_draws_among_the_kept_ids_are_impossible() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 0.0]])
    sums = sample_sums(weights, *count_distinct(torch.tensor([[0, 1, 0], [0, 1, 2]])), 3)
    assert sums.impossible.tolist() == [2, 0]  # where nothing can be drawn, anything may stand


def test_common_draws_count_repeats_and_no_order() -> None:
    one = torch.tensor([[5, 5, 7, 9], [1, 2, 3, 4]])
    other = torch.tensor([[9, 5, 8, 8], [4, 3, 2, 1]])
    overlap = sampled_overlap(*count_distinct(one), *count_distinct(other))
    assert overlap.tolist() == [0.5, 1.0]


def test_empty_slots_are_no_draws_of_id_0() -> None:
    empty = torch.tensor([[7, 0, 0]]), torch.tensor([[3, 0, 0]])
    full = torch.tensor([[0, 7]]), torch.tensor([[2, 1]])
    assert sampled_overlap(*empty, *full).tolist() == [pytest.approx(1 / 3)]
    assert sampled_overlap(*full, *empty).tolist() == [pytest.approx(1 / 3)]


def test_counts_that_are_too_large_do_not_agree() -> None:
    ids = torch.tensor([[3, 4]])
    doubled = sampled_overlap(ids, torch.tensor([[4, 2]]), ids, torch.tensor([[2, 1]]))
    assert doubled.tolist() == [0.5]
