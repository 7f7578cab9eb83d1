from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import MismatchError, ParamsError
from pipeline.targets.block_search import block_top_k
from pipeline.targets.reduce import row_uniforms, top_k_from_logits
from pipeline.targets.selection import keep_highest_entropy, number_kept
from pipeline.targets.topk import TopK
from tests.helpers import every_sample

TAUS = (1.0, 2.0, 4.0)


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 400), k=st.integers(1, 40), seed=st.integers(0, 10**6), ties=st.booleans()
)
def test_block_top_k_equals_torch_topk(size: int, k: int, seed: int, ties: bool) -> None:
    k = min(k, size)
    values = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    if ties:
        values = values.round()
    found, ids = block_top_k(values, k)
    assert torch.equal(found, values.topk(k).values)
    assert torch.equal(values.gather(-1, ids), found)
    assert all(len(set(row.tolist())) == k for row in ids)


def test_top_k_from_logits_against_float64() -> None:
    logits = torch.randn(7, 1000) * 4 + 30
    topk = top_k_from_logits(logits.clone(), 10, TAUS)
    exact = logits.double()
    log_p = exact.log_softmax(-1)
    assert torch.equal(topk.ids, exact.topk(10).indices)
    torch.testing.assert_close(topk.lse.double(), exact.logsumexp(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        topk.logprobs.double(), log_p.gather(-1, topk.ids), atol=2e-5, rtol=0
    )
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(topk.entropy.double(), entropy, atol=1e-5, rtol=0)
    assert topk.temperatures == (2.0, 4.0)
    for column, tau in enumerate(topk.temperatures):
        normaliser = (log_p / tau).logsumexp(-1)
        torch.testing.assert_close(
            topk.lse_tau[:, column].double(), normaliser, atol=2e-5, rtol=1e-6
        )


@pytest.mark.parametrize("tau", TAUS)
def test_target_is_the_full_softmax_at_the_kept_ids(tau: float) -> None:
    logits = torch.randn(5, 300) * 3
    topk = top_k_from_logits(logits.clone(), 8, TAUS)
    log_p, tail = topk.target(tau)
    full = (logits / tau).log_softmax(-1)
    torch.testing.assert_close(log_p, full.gather(-1, topk.ids), atol=1e-5, rtol=0)
    kept = full.exp().gather(-1, topk.ids).sum(-1)
    torch.testing.assert_close(tail, 1 - kept, atol=1e-5, rtol=0)


def test_target_at_a_temperature_not_stored_names_those_stored() -> None:
    topk = top_k_from_logits(torch.randn(2, 50), 4, (1.0, 2.0))
    with pytest.raises(MismatchError, match=r"temperature=3 .*\(1, 2\)"):
        topk.target(3.0)


def test_no_tail_when_k_is_the_vocabulary() -> None:
    topk = top_k_from_logits(torch.randn(4, 20), 20, (1.0,))
    assert torch.equal(topk.target(1.0)[1], torch.zeros(4))


def test_k_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ParamsError, match="k=21 exceeds the 20 ids"):
        top_k_from_logits(torch.randn(4, 20), 21, (1.0,))


def test_prefix_keeps_the_normalisers() -> None:
    topk = top_k_from_logits(torch.randn(4, 60), 10, TAUS)
    short = topk.prefix(3)
    assert short.k == 3
    assert torch.equal(short.ids, topk.ids[:, :3])
    assert torch.equal(short.lse_tau, topk.lse_tau)
    with pytest.raises(ParamsError, match=r"k=11 is outside 1\.\.10"):
        topk.prefix(11)


def test_index_stack_cat_round_trip() -> None:
    topk = top_k_from_logits(torch.randn(6, 60), 10, TAUS)
    rows = [topk[i] for i in range(6)]
    for joined in (TopK.stack(rows), TopK.cat([topk[:2], topk[2:]])):
        assert torch.equal(joined.ids, topk.ids)
        assert torch.equal(joined.lse_tau, topk.lse_tau)
        assert joined.temperatures == topk.temperatures


@settings(deadline=None, max_examples=40)
@given(size=st.integers(2, 300), k=st.integers(0, 20), seed=st.integers(0, 10**6))
def test_draws_invert_the_running_sum(size: int, k: int, seed: int) -> None:
    """In two stages the same ids as by one running sum over the vocabulary, in float64."""
    k = min(k, size - 1)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, size, generator=generator) * 3
    uniforms = torch.rand(4, 30, generator=generator).sort(-1).values  # so the ids ascend, too
    topk = top_k_from_logits(logits.clone(), k, (2.0,), uniforms)
    weights = (logits - logits.amax(-1, True)).double().exp().scatter(-1, topk.ids, 0.0)
    running = weights.cumsum(-1) / weights.sum(-1, True)
    plain = torch.searchsorted(running, uniforms.double(), right=True).clamp_max(size - 1)
    near = (running.gather(-1, plain) - uniforms).abs() < 1e-5
    near |= (running.gather(-1, (plain - 1).clamp_min(0)) - uniforms).abs() < 1e-5
    assert bool(((every_sample(topk) == plain) | near).all())
    assert not bool((topk.sampled_ids[:, :, None] == topk.ids[:, None, :]).any())
    log_p = logits.log_softmax(-1).gather(-1, topk.sampled_ids)
    torch.testing.assert_close(topk.sampled_logprobs, log_p, atol=2e-5, rtol=1e-5)


def test_draws_never_take_what_cannot_be() -> None:
    """Ids of no mass at all, at the ends of blocks, and uniforms at the ends of their range."""
    logits = torch.full((1, 200), -torch.inf)
    logits[0, [3, 64, 130]] = torch.tensor([2.0, 0.0, 0.0])
    uniforms = torch.tensor([[0.0, 1e-8, 0.4999, 0.5001, 1 - 2**-24]])
    topk = top_k_from_logits(logits, 1, (), uniforms)
    assert topk.ids.tolist() == [[3]]
    assert every_sample(topk).tolist() == [[64, 64, 64, 130, 130]]
    assert topk.sampled_ids.tolist() == [[64, 130, 64, 64, 64]]
    assert topk.sampled_counts.tolist() == [[3, 2, 0, 0, 0]]
    assert topk.sampled_logprobs.shape == (1, 0)  # nothing needs them at temperature 1


def test_draws_depend_on_seed_and_row_alone() -> None:
    together = row_uniforms(range(4, 9), 6, 3, seed=1)
    assert torch.equal(together[2:4], row_uniforms([6, 7], 6, 3, seed=1))
    assert not torch.equal(together, row_uniforms(range(4, 9), 6, 3, seed=2))
    assert together.shape == (5, 6, 3)
    assert row_uniforms([0], 6, 0, seed=1).shape == (1, 6, 0)


def test_weights_of_draws_at_a_temperature() -> None:
    """w = p_t / M * p_tau / p: by hand, with p = (1/2, 1/4, 1/8, 1/8), T = {0}, two sampled ids."""
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    topk = top_k_from_logits(probabilities.log(), 1, (1.0, 2.0), torch.tensor([[0.1, 0.9]]))
    assert topk.sampled_ids.tolist() == [[1, 3]]
    weight, outside = topk.sampled_target(1.0)
    torch.testing.assert_close(weight, torch.tensor([[0.25, 0.25]]))
    log_p = probabilities.log()
    torch.testing.assert_close(outside, (probabilities * log_p)[:, 1:].sum(-1))  # exact
    root = probabilities.sqrt()
    p_tau = (root / root.sum())[:, [1, 3]]
    weight, outside = topk.sampled_target(2.0)
    expected = 0.25 * p_tau / probabilities[:, [1, 3]]
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(outside, (expected * p_tau.log()).sum(-1))
    twice = top_k_from_logits(probabilities.log(), 1, (2.0,), torch.tensor([[0.1, 0.2]]))
    assert twice.sampled_ids.tolist() == [[1, 1]]
    assert twice.sampled_counts.tolist() == [[2, 0]]
    torch.testing.assert_close(twice.sampled_target(1.0)[0], torch.tensor([[0.5, 0.0]]))


def test_spread_leaves_no_target_elsewhere() -> None:
    topk = top_k_from_logits(torch.randn(3, 20), 4, (2.0,), torch.rand(3, 5))
    wide = topk.spread(torch.tensor([1, 2, 5]), (2, 3))
    assert wide.has_target.tolist() == [[False, True, True], [False, False, True]]
    assert torch.equal(wide[wide.has_target].ids, topk.ids)
    assert not bool(wide[~wide.has_target].is_kept.any())
    assert not bool(wide[~wide.has_target].sampled_counts.any())


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), top_p=st.floats(0.01, 1.0), k=st.integers(1, 30))
def test_nucleus_is_the_smallest_set_that_holds_the_mass(seed: int, top_p: float, k: int) -> None:
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(seed)) * 3
    whole = top_k_from_logits(logits.clone(), k, ())
    cut = top_k_from_logits(logits.clone(), k, (), None, top_p)
    for row in range(4):
        p, number = whole.logprobs[row].double().exp(), int(cut.is_kept[row].sum())
        assert 1 <= number <= k
        assert cut.is_kept[row].tolist() == [True] * number + [False] * (k - number)
        assert number == 1 or p[: number - 1].sum() < top_p + 1e-6
        assert number == k or p[:number].sum() > top_p - 1e-6
        assert torch.equal(cut.ids[row, :number], whole.ids[row, :number])
        assert bool((cut.ids[row, number:] == whole.ids[row, 0]).all())
    torch.testing.assert_close(cut.entropy, whole.entropy)


def test_nucleus_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, number in ((0.4, 1), (0.6, 2), (0.81, 3), (0.99, 3), (None, 3)):
        assert top_k_from_logits(logits, 3, (), None, top_p).is_kept.sum() == number
    assert top_k_from_logits(logits, 4, (), None, 0.6).target(1.0)[1].item() == pytest.approx(0.2)


def test_samples_are_taken_outside_the_nucleus() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2, -1)
    topk = top_k_from_logits(logits, 3, (), torch.linspace(0.01, 0.99, 40).expand(2, -1), 0.4)
    assert topk.sampled_ids[0][topk.sampled_counts[0] > 0].tolist() == [1, 2, 3]
    assert topk.sampled_counts[0, :3].tolist() == [24, 12, 4]  # in proportion to what is left


def test_positions_of_highest_entropy_by_hand() -> None:
    topk = top_k_from_logits(torch.zeros(10, 5), 2, ()).map(lambda t: t.view(2, 5, *t.shape[1:]))
    entropy = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 1.0, 1.0, 9.0, 1.0]])
    has_target = torch.tensor([[True] * 5, [True, True, True, False, True]])
    topk = replace(topk, entropy=entropy, has_target=has_target)
    for quantile, kept in (
        (0.0, [[0, 1, 2, 3, 4], [0, 1, 2, 4]]),
        (0.5, [[0, 3, 4], [0, 1]]),
        (0.8, [[3], [0]]),
        (0.99, [[3], [0]]),
    ):
        chosen = keep_highest_entropy(topk, quantile).has_target
        assert [row.nonzero()[:, 0].tolist() for row in chosen] == kept
        assert number_kept(has_target.sum(-1), quantile).tolist() == [len(k) for k in kept]
