from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pipeline.store.codec import decode, encode, from_steps, to_steps
from pipeline.store.schema import FORMAT_VERSION, Fingerprint
from pipeline.topk import top_k_from_logits


@given(npst.arrays(np.uint16, npst.array_shapes(min_dims=1, max_dims=3)))
def test_steps_are_exact_for_any_bits(bits: np.ndarray) -> None:
    values = bits.view(np.float16)
    assert np.array_equal(from_steps(to_steps(values)).view(np.uint16), bits)


@given(st.lists(st.floats(-60000, 0, width=16), min_size=2, max_size=64))
def test_falling_log_probabilities_make_rising_steps(values: list[float]) -> None:
    falling = np.sort(np.array(values, dtype=np.float16))[::-1].copy()
    falling[falling == 0] = -0.0
    steps = to_steps(falling)[1:]
    assert bool((steps < 2**15).all())


def test_encode_decode_loses_only_float16_rounding() -> None:
    topk = top_k_from_logits(torch.randn(6, 500) * 5, 20, (1.0, 3.0))
    fingerprint = Fingerprint(
        format_version=FORMAT_VERSION,
        teacher_sha256="",
        tokenizer_sha256="",
        corpus_sha256="",
        dtype="float32",
        attention="packed",
        k=20,
        temperatures=(1.0, 3.0),
        vocab_size=500,
        num_rows=6,
        row_length=1,
    )
    again = decode(encode(topk), fingerprint)
    assert torch.equal(again.ids, topk.ids)
    assert torch.equal(again.logprobs, topk.logprobs.half().float())
    assert torch.equal(again.lse, topk.lse)
    assert torch.equal(again.lse_tau, topk.lse_tau)
    assert torch.equal(again.entropy, topk.entropy.half().float())
    assert again.temperatures == (1.0, 3.0)


def test_ids_take_the_smaller_type_that_fits() -> None:
    small = top_k_from_logits(torch.randn(2, 65_536), 3, ())
    large = top_k_from_logits(torch.randn(2, 65_537), 3, ())
    assert encode(small)["ids"].dtype == np.uint16
    assert encode(large)["ids"].dtype == np.uint32
