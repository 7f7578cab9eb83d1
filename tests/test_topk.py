from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import MismatchError, ParamsError
from pipeline.topk import TopK, block_top_k, top_k_from_logits

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
    for column, tau in enumerate(TAUS):
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
        assert joined.temperatures == TAUS
