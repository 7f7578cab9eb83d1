"""Logits with a cache equal logits without, however the text is split, padded or batched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.errors import ParamsError
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.model.kv_cache import KVCache

CONFIG = ModelConfig(
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    vocab_size=71,
    max_seq_len=32,
)


QWEN3 = replace(CONFIG, head_dim=12, qk_norm=True, attention_bias=False)


@pytest.fixture(params=[CONFIG, QWEN3], ids=["qwen2", "qwen3"])
def student(request: pytest.FixtureRequest) -> StudentModel:
    model = StudentModel(request.param).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # else attention is nearly uniform, hiding mistakes
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
@pytest.mark.parametrize("splits", [[20], [1] * 20, [7, 13], [12, 1, 1, 6], [1, 9, 1, 9]])
def test_logits_with_cache_equal_logits_without(student: StudentModel, splits: list[int]) -> None:
    tokens = torch.randint(0, 71, (2, 20))
    cache = student.new_cache(2, 24)
    parts = [student(part, cache=cache) for part in tokens.split(splits, 1)]
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(parts, 1), student(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("splits", [[14], [9, 5], [8, 1, 1, 4], [9, 1, 1, 1, 1, 1]])
def test_padded_rows_equal_each_row_alone(student: StudentModel, splits: list[int]) -> None:
    lengths = [14, 9, 6]
    rows = [torch.randint(0, 71, (length,)) for length in lengths]
    tokens, mask = torch.full((3, 14), 70), torch.zeros(3, 14, dtype=torch.int64)
    for row, length, target, real in zip(rows, lengths, tokens, mask, strict=True):
        target[14 - length :], real[14 - length :] = row, 1
    cache = student.new_cache(3, 14, attention_mask=mask)
    logits = torch.cat([student(part, cache=cache) for part in tokens.split(splits, 1)], 1)
    assert torch.isfinite(logits).all()
    for row, length, found in zip(rows, lengths, logits, strict=True):
        alone = student(row[None])[0]
        torch.testing.assert_close(found[14 - length :], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cache_is_one_tensor_filled_from_the_front(student: StudentModel) -> None:
    cache = student.new_cache(2, 10)
    width = student.config.head_size
    assert cache.tensor.shape == (3, 2, 2, 2, 10, width)  # layers, k and v, B, G, max_len, E
    before = cache.tensor.data_ptr()
    student(torch.randint(0, 71, (2, 4)), cache=cache)
    assert cache.length == 4
    filled = cache.tensor.abs().sum((0, 1, 2, 3, 5)) > 0
    assert filled.tolist() == [True] * 4 + [False] * 6
    prefix = cache.tensor[..., :4, :].clone()
    student(torch.randint(0, 71, (2, 1)), cache=cache)
    assert torch.equal(cache.tensor[..., :4, :], prefix)
    assert cache.layers[1].keys.data_ptr() == cache.tensor[1, 0].data_ptr()
    assert cache.tensor.data_ptr() == before


def test_positions_and_mask_of_a_padded_batch() -> None:
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    cache = StudentModel(CONFIG).new_cache(2, 5, attention_mask=mask)
    assert cache.positions(3).tolist() == [[0, 0, 0], [0, 1, 2]]  # cumsum(mask) - 1, not below 0
    seen = cache.mask(3)
    assert seen is not None
    assert seen.int().tolist() == [
        [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]],  # padding sees itself: no row is empty
        [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]],
    ]


def test_full_prompts_need_no_mask() -> None:
    cache = StudentModel(CONFIG).new_cache(2, 5, attention_mask=torch.ones(2, 3))
    assert cache.padding is None
    assert cache.mask(3) is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0], [1, 1, 1]], "pad prompts on the left"),
        ([[1, 0, 1], [1, 1, 1]], "pad prompts on the left"),
        ([[0, 0, 0], [1, 1, 1]], "pad prompts on the left"),
        ([[1, 1, 1]], r"give \[2, L\]"),
    ],
)
def test_other_padding_is_refused(mask: list[list[int]], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        StudentModel(CONFIG).new_cache(2, 5, attention_mask=torch.tensor(mask))


@torch.no_grad()
def test_no_room_is_a_sentence(student: StudentModel) -> None:
    cache = student.new_cache(1, 4)
    student(torch.zeros(1, 4, dtype=torch.int64), cache=cache)
    with pytest.raises(ParamsError, match=r"4 \+ 1 tokens exceed the 4"):
        student(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    with pytest.raises(ParamsError, match="33 tokens exceeds the student's max_seq_len=32"):
        student.new_cache(1, 33)


@torch.no_grad()
def test_cache_has_the_dtype_of_the_model() -> None:
    student = StudentModel(CONFIG).to(torch.bfloat16)
    cache = student.new_cache(1, 8)
    assert isinstance(cache, KVCache)
    assert cache.tensor.dtype == torch.bfloat16
    assert student(torch.zeros(1, 3, dtype=torch.int64), cache=cache).dtype == torch.bfloat16
