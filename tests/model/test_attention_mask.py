"""Documents packed into one row: as if each were alone, in student and in Hugging Face."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.data.packing import PADDING
from pipeline.model import attention_mask
from pipeline.model.attention_mask import (
    Segments,
    document_mask,
    document_positions,
    documents_apart,
)
from pipeline.model.decoder import ModelConfig, StudentModel, attention_plain
from pipeline.model.weights import load_student
from tests.helpers import SMALL
from tests.models import hugging_face

LENGTHS = (7, 1, 12, 4)  # of the documents in one row
PADDED = 3


def packed_row(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and document ids [1, 27] of four documents and padding; ids need not start at 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 257, (1, sum(LENGTHS) + PADDED), generator=generator)
    ids = [8 + number for number, length in enumerate(LENGTHS) for _ in range(length)]
    return tokens, torch.tensor([ids + [PADDING] * PADDED])


def test_positions_and_mask_by_hand() -> None:
    doc_ids = torch.tensor([[5, 5, 6, PADDING]], dtype=torch.int32)
    assert document_positions(doc_ids).tolist() == [[0, 1, 0, 1]]
    assert document_mask(doc_ids)[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],  # padding goes on with the document before it
    ]


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=6), min_size=1, max_size=3))
def test_mask_is_causal_within_documents_and_never_empty(lengths: list[list[int]]) -> None:
    size = max(map(sum, lengths))
    rows = [[n for n, length in enumerate(row) for _ in range(length)] for row in lengths]
    doc_ids = torch.tensor([row + [PADDING] * (size - len(row)) for row in rows])
    mask, positions = document_mask(doc_ids), document_positions(doc_ids)
    assert mask.shape == (len(rows), 1, size, size)
    for b, row in enumerate(rows):
        for q in range(len(row)):
            seen = [k for k in range(size) if mask[b, 0, q, k]]
            assert seen == [k for k in range(q + 1) if row[k] == row[q]]
            assert positions[b, q] == len(seen) - 1
    assert bool(mask.diagonal(dim1=-2, dim2=-1).all())


def test_no_mask_where_plain_causal_attention_does_the_same() -> None:
    alone = torch.tensor([[3, 3, 3, 3], [4, 4, PADDING, PADDING]])
    several = torch.tensor([[3, 3, 3, 3], [4, 4, 5, PADDING]])
    assert documents_apart(alone, True) is None
    assert documents_apart(several, True) is several
    assert documents_apart(several, False) is None


def test_the_masked_path_of_one_document_is_the_plain_one() -> None:
    """The twin of the fast path, gradients included, padding too."""
    config = ModelConfig(hidden_size=64, num_layers=3, num_heads=8, num_kv_heads=2, vocab_size=257)
    student = StudentModel(config)
    tokens, _ = packed_row()
    doc_ids = torch.full_like(tokens, 2)
    doc_ids[:, -PADDED:] = PADDING
    found = []
    for ids in (None, doc_ids):
        hidden = student.hidden_states(tokens, ids)
        hidden.square().sum().backward()
        found.append((hidden, [parameter.grad.clone() for parameter in student.model.parameters()]))
        student.zero_grad()
    (plain, plain_grads), (masked, masked_grads) = found
    torch.testing.assert_close(masked, plain, atol=1e-5, rtol=1e-5)
    for one, two in zip(masked_grads, plain_grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_student_sees_each_document_as_if_alone(kind: str, tmp_path: Path) -> None:
    hugging_face(kind, True).save_pretrained(tmp_path)
    student = load_student(tmp_path).eval()
    tokens, doc_ids = packed_row()
    logits = student(tokens, doc_ids)
    assert bool(torch.isfinite(logits).all())
    plain = student(tokens)
    start = 0
    for length in LENGTHS:
        place = slice(start, start + length)
        alone = student(tokens[:, place])
        torch.testing.assert_close(logits[:, place], alone, atol=1e-5, rtol=1e-5)
        assert start == 0 or not torch.allclose(plain[:, place], alone, atol=1e-2)
        start += length


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_student_and_hugging_face_keep_the_same_documents_apart(kind: str, tmp_path: Path) -> None:
    theirs = hugging_face(kind, False)
    theirs.save_pretrained(tmp_path)
    tokens, doc_ids = packed_row()
    positions = document_positions(doc_ids)
    expected = theirs(tokens, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(
        load_student(tmp_path)(tokens, doc_ids), expected, atol=1e-5, rtol=1e-5
    )


def flash_on_a_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    bounds_k: Tensor,
    longest: int,
    longest_k: int,
) -> Tensor:
    """What PyTorch's varlen_attn computes, document by document."""
    assert torch.equal(bounds, bounds_k)
    assert bounds.dtype == torch.int32
    assert int(bounds.diff().max()) <= longest == longest_k
    parts = []
    for start, stop in pairwise(bounds.tolist()):
        part = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
        parts.append(attention_plain(*part)[0][0].transpose(0, 1))
    return torch.cat(parts)


def test_segments_are_the_documents() -> None:
    doc_ids = torch.tensor([[5, 5, 6, PADDING], [6, 6, 7, 7]], dtype=torch.int32)
    found = Segments.of(doc_ids, torch.device("cpu"), flash_on_a_cpu)
    assert found.bounds.tolist() == [0, 2, 4, 6, 8]  # padding continues its document
    assert found.longest == 4


def test_a_head_that_flash_attention_would_have_to_pad_gets_a_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    attention_mask.flash_within.cache_clear()
    assert attention_mask.flash_within(torch.device("cuda"), torch.bfloat16, 64) is not None
    for head_size in (12, 20, 264):
        assert attention_mask.flash_within(torch.device("cuda"), torch.bfloat16, head_size) is None
    attention_mask.flash_within.cache_clear()


def test_attention_within_segments_is_attention_under_the_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = StudentModel(ModelConfig(**SMALL))
    tokens = torch.randint(0, 300, (2, 9))
    doc_ids = torch.tensor([[0, 0, 1, 1, 1, 1, 2, PADDING, PADDING], [3] * 5 + [4] * 4])
    student.eval()
    expected = student(tokens, doc_ids)
    monkeypatch.setattr(attention_mask, "flash_within", lambda *_: flash_on_a_cpu)
    torch.testing.assert_close(student(tokens, doc_ids), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(
        attention_mask.attention_within(doc_ids, tokens.device, torch.float32, 8, 0.1), Tensor
    ), "segments have no dropout"


@pytest.mark.gpu
def test_on_a_gpu_segments_and_masks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients in bfloat16, where PyTorch has attention within segments."""
    if attention_mask.flash_within(torch.device("cuda"), torch.bfloat16, 64) is None:
        pytest.skip("no attention within segments here")
    config = ModelConfig(**SMALL | {"hidden_size": 256})
    student = StudentModel(config).cuda()
    tokens = torch.randint(0, 300, (2, 64), device="cuda")
    doc_ids = torch.tensor([[0] * 20 + [1] * 44, [2] * 50 + [3] * 10 + [PADDING] * 4])
    found = []
    for flash in (attention_mask.flash_within, lambda *_: None):
        monkeypatch.setattr(attention_mask, "flash_within", flash)
        student.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            states = student.hidden_states(tokens, doc_ids)
        states.float().square().sum().backward()
        weight = student.model.layers[0].self_attn.q_proj.weight
        assert weight.grad is not None
        found.append((states.detach().float(), weight.grad))
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02
