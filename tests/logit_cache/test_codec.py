from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pipeline.logit_cache.codec import IdOrder, encode, from_deltas, restore, to_deltas, to_topk
from pipeline.logit_cache.format import FORMAT_VERSION, Fingerprint
from pipeline.targets.reduce import top_k_from_logits

UNSIGNED = st.sampled_from([np.uint16, np.uint32])


@given(UNSIGNED.flatmap(lambda t: npst.arrays(t, npst.array_shapes(min_dims=2, max_dims=3))))
def test_steps_are_exact_for_any_bits(values: np.ndarray) -> None:
    assert np.array_equal(from_deltas(to_deltas(values)), values)
    front = np.moveaxis(to_deltas(values), -1, 0)
    assert np.array_equal(np.moveaxis(from_deltas(front, axis=0), 0, -1), values)


@given(st.lists(st.floats(-60000, 0, width=16), min_size=2, max_size=64))
def test_falling_log_probabilities_make_rising_steps(values: list[float]) -> None:
    falling = np.sort(np.array(values, dtype=np.float16))[::-1].copy()
    falling[falling == 0] = -0.0
    assert bool((to_deltas(falling.view(np.uint16))[1:] < 2**15).all())


def fingerprint(**changes: Any) -> Fingerprint:
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "teacher_sha256": "",
        "tokenizer_sha256": "",
        "corpus_sha256": "",
        "dtype": "float32",
        "engine": "transformers",
        "document_mask": False,
        "k": 20,
        "num_sampled": 0,
        "sampling_seed": 0,
        "temperatures": (1.0, 3.0),
        "vocab_size": 500,
        "num_rows": 2,
        "row_length": 3,
    }
    return Fingerprint(**(values | changes))


@pytest.mark.parametrize(("k", "num_sampled"), [(20, 0), (8, 12), (0, 30), (500, 0)])
def test_encode_and_restore_lose_only_float16_rounding(k: int, num_sampled: int) -> None:
    topk = top_k_from_logits(torch.randn(6, 500) * 5, k, (1.0, 3.0), torch.rand(6, num_sampled))
    topk = topk.map(lambda t: t.view(2, 3, *t.shape[1:]))
    id_order = IdOrder.by_frequency(topk.ids.numpy(), 500)
    stored = encode(topk, id_order)
    expected = {"id_indices", "logprob_deltas"} if k else set()
    expected |= {"sampled_index_deltas", "sampled_logprobs"} if num_sampled else set()
    assert set(stored) == expected | {"lse", "lse_tau", "entropy"}
    chunks = {
        name: [np.moveaxis(values, -1, 0) if name == "logprob_deltas" else values]
        for name, values in stored.items()
    }
    arrays = {name: restore(name, parts) for name, parts in chunks.items()}
    again = to_topk(arrays, id_order, fingerprint(k=k, num_sampled=num_sampled))
    assert torch.equal(again.ids, topk.ids)
    assert torch.equal(again.logprobs, topk.logprobs.half().float())
    assert torch.equal(again.lse, topk.lse)
    assert torch.equal(again.lse_tau, topk.lse_tau)
    assert torch.equal(again.entropy, topk.entropy.half().float())
    assert again.temperatures == (1.0, 3.0)
    # The order of sampled ids means nothing; each keeps its own log-probability.
    for ours, theirs in ((again, topk), (topk, again)):
        ids, order = ours.sampled_ids.sort(-1)
        assert torch.equal(ids, theirs.sampled_ids.sort(-1).values)
        rounded = ours.sampled_logprobs.gather(-1, order).half()
        other = theirs.sampled_logprobs.gather(-1, theirs.sampled_ids.sort(-1).indices).half()
        assert torch.equal(rounded, other)


def test_ids_take_the_smaller_type_that_fits() -> None:
    assert IdOrder(np.arange(65_536)).index_of.dtype == np.uint16
    assert IdOrder(np.arange(65_537)).index_of.dtype == np.uint32


def test_ranks_go_by_appearance_then_by_id() -> None:
    id_order = IdOrder.by_frequency(np.array([[4, 4, 1], [4, 1, 3]]), 6)
    assert id_order.ids.tolist() == [4, 1, 3, 0, 2, 5]
    assert id_order.index_of.tolist() == [3, 1, 4, 2, 0, 5]
