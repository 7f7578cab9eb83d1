from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pipeline.io.checked_json import DamagedError
from pipeline.logit_cache.codec import (
    Arrays,
    IdOrder,
    as_stored,
    decode,
    encode,
    from_deltas,
    to_deltas,
    to_topk,
)
from pipeline.logit_cache.format import FORMAT_VERSION, Fingerprint
from pipeline.targets.reduce import top_k_from_logits
from pipeline.targets.topk import TopK

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
        "temperatures": (3.0,),
        "top_p": None,
        "entropy_quantile": 0.0,
        "vocab_size": 500,
        "num_rows": 2,
        "row_length": 3,
    }
    return Fingerprint(**(values | changes))


def chunks_of(stored: Arrays, rows: int, chunk_rows: int) -> dict[str, list[np.ndarray]]:
    """Cut encoded arrays as `decode_shard` returns them: ragged ones by row, others by rows."""
    ragged = -(-rows // chunk_rows)
    found = {}
    for name, values in stored.items():
        size = 1 if values.ndim == 2 and len(values) == ragged != rows else chunk_rows
        size = 1 if name in RAGGED else size
        found[name] = [values[i : i + size] for i in range(0, len(values), size)]
    return found


RAGGED = {
    "id_indices",
    "logprob_deltas",
    "sampled_index_deltas",
    "sampled_counts",
    "sampled_logprobs",
}


def by_id(topk: TopK) -> list[list[tuple[int, int, float]]]:
    """The sampled ids of each position, in order, with count and log-probability if there is."""
    flat = topk.map(lambda t: t.flatten(0, 1))
    logprobs = flat.sampled_logprobs if topk.temperatures else flat.sampled_counts * 0.0
    return [
        sorted((i, c, p) for i, c, p in zip(*position, strict=True) if c)
        for position in zip(
            flat.sampled_ids.tolist(), flat.sampled_counts.tolist(), logprobs.tolist(), strict=True
        )
    ]


MODES = [
    {"k": 20},
    {"k": 20, "top_p": 0.7},
    {"k": 8, "num_sampled": 12},
    {"k": 8, "num_sampled": 12, "top_p": 0.5, "temperatures": ()},
    {"k": 0, "num_sampled": 30},
    {"k": 0, "num_sampled": 300, "temperatures": ()},
    {"k": 500},
    {"k": 500, "top_p": 0.9, "temperatures": (0.5, 3.0)},
]


@pytest.mark.parametrize("chunk_rows", [1, 2, 5])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_encode_and_decode_only_round(mode: dict[str, Any], chunk_rows: int) -> None:
    made_from = fingerprint(num_rows=5, **mode)
    k, most = made_from.k, made_from.num_sampled
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(15, 500, generator=generator) * 5
    uniforms = torch.rand(15, most, generator=generator)
    topk = top_k_from_logits(logits, k, made_from.temperatures, uniforms, made_from.top_p)
    index = torch.tensor([0, 1, 2, 3, 5, 7, 8, 9, 10])  # none at all in the last row
    topk = topk[index].spread(index, (5, 3))
    id_order = IdOrder.of(topk)
    stored = encode(topk, id_order, made_from, chunk_rows)
    expected = {"num_kept", "id_indices", "logprob_deltas"} if k else set()
    expected |= {"num_distinct", "sampled_index_deltas", "sampled_counts"} if most else set()
    expected |= {"sampled_logprobs"} if most and made_from.temperatures else set()
    assert set(stored) == expected | {"lse", "entropies"}
    arrays = decode(chunks_of(stored, 5, chunk_rows), made_from)
    again, wanted = to_topk(arrays, id_order, made_from), as_stored(topk)
    assert torch.equal(again.has_target, topk.has_target)
    assert again.has_target.sum() == 9
    there, wanted = again[again.has_target], wanted[topk.has_target]
    for name in ("logprobs", "lse", "entropy"):
        assert torch.equal(getattr(there, name), getattr(wanted, name)), name
    assert torch.equal(there.is_kept, wanted.is_kept)
    assert torch.equal(there.ids, wanted.ids)
    torch.testing.assert_close(there.lse_tau, wanted.lse_tau)
    exact = topk[topk.has_target]
    slack = 1.0 / 8192 + 1e-6  # half a step of the entropy that a normaliser is made of
    for j, tau in enumerate(made_from.temperatures):
        off = (there.lse_tau - exact.lse_tau)[:, j].abs().max()
        assert off <= abs(1.0 - 1.0 / tau) * slack
    assert (there.entropy - exact.entropy).abs().max() <= slack
    assert by_id(again) == by_id(as_stored(topk))
    if most:
        assert (again.sampled_counts.sum(-1)[again.has_target] == most).all()
        assert again.sampled_ids.shape[-1] == (topk.sampled_counts > 0).sum(-1).max()
    assert again.temperatures == made_from.temperatures


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_shard_without_any_target(mode: dict[str, Any]) -> None:
    """As prompts that fill whole rows leave it."""
    made_from = fingerprint(num_rows=2, **mode)
    uniforms = torch.rand(0, made_from.num_sampled)
    none = torch.tensor([], dtype=torch.int64)
    topk = top_k_from_logits(
        torch.randn(0, 500), made_from.k, made_from.temperatures, uniforms, made_from.top_p
    ).spread(none, (2, 3))
    stored = encode(topk, IdOrder.of(topk), made_from, 1)
    assert not any(values.any() for values in stored.values())
    again = to_topk(decode(chunks_of(stored, 2, 1), made_from), IdOrder.of(topk), made_from)
    assert again.lse.shape == (2, 3)
    assert not bool(again.has_target.any())


def test_ragged_values_by_hand() -> None:
    """Three positions with 2, 0 and 1 ids of K = 2, in one chunk."""
    logits = torch.tensor([[0.0, 3.0, 2.9], [0.0, 0.0, 0.0], [9.0, 0.0, 1.0]])
    topk = top_k_from_logits(logits, 2, (), None, 0.9)[torch.tensor([0, 2])]
    topk = topk.spread(torch.tensor([0, 2]), (1, 3))
    made_from = fingerprint(k=2, temperatures=(), vocab_size=3, num_rows=1)
    stored = encode(topk, IdOrder(np.arange(3)), made_from, 2)
    assert stored["num_kept"].tolist() == [[2, 0, 1]]
    assert stored["num_kept"].dtype == np.uint8
    assert stored["id_indices"].tolist() == [[1, 2, 0] + [0] * 9]
    assert stored["id_indices"].shape == (1, 2 * 3 * 2)
    first = topk.logprobs[0, :, 0].half()
    second = topk.logprobs[0, 0, 1].half()
    bits = [int(v.view(torch.int16)) & 0xFFFF for v in (first[0], first[2], second)]
    assert stored["logprob_deltas"].tolist() == [[*bits[:2], bits[2] - bits[0]] + [0] * 9]
    assert stored["entropies"][0, :, 0].tolist() == [
        round(float(topk.entropy[0, 0]) * 4096),
        0,
        round(float(topk.entropy[0, 2]) * 4096),
    ]


def test_more_ids_than_a_position_can_hold_are_damage() -> None:
    topk = top_k_from_logits(torch.randn(6, 500), 20, (3.0,))
    topk = topk.map(lambda t: t.view(2, 3, *t.shape[1:]))
    chunks = chunks_of(encode(topk, IdOrder.of(topk), fingerprint(), 2), 2, 2)
    chunks["num_kept"] = [chunks["num_kept"][0] + np.uint8(1)]
    with pytest.raises(DamagedError, match="21 of at most 20 ids"):
        decode(chunks, fingerprint())


def test_ids_take_the_smaller_type_that_fits() -> None:
    assert IdOrder(np.arange(65_536)).index_of.dtype == np.uint16
    assert IdOrder(np.arange(65_537)).index_of.dtype == np.uint32


def test_ranks_go_by_appearance_then_by_id() -> None:
    id_order = IdOrder.by_frequency(np.array([[4, 4, 1], [4, 1, 3]]), 6)
    assert id_order.ids.tolist() == [4, 1, 3, 0, 2, 5]
    assert id_order.index_of.tolist() == [3, 1, 4, 2, 0, 5]
