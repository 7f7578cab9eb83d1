"""A teacher over packed rows: each document as if alone, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BloomConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.data.packing import IGNORE, PADDING, next_token_labels
from pipeline.errors import DecantError
from pipeline.losses.chunked import distillation_loss_sums
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.teacher.transformers import HuggingFaceTeacher

SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    # a window shorter than the documents, in every layer and in some
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=3),
    "qwen2 windows": lambda: Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "gpt2": lambda: GPT2Config(  # positions are learned: those of a packed document must restart
        vocab_size=101, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2
    ),
}
LENGTHS = (6, 1, 11, 5)


def make_teacher(folder: Path, config: Any, vocab_size: int = 101) -> HuggingFaceTeacher:
    torch.manual_seed(0)
    Auto.from_config(config).save_pretrained(folder)
    return HuggingFaceTeacher(
        folder, vocab_size=vocab_size, dtype=torch.float32, device=torch.device("cpu"), head_chunk=7
    )


def packed_row(lengths: tuple[int, ...] = LENGTHS, padding: int = 2) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 101, (1, sum(lengths) + padding))
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    return tokens, torch.tensor([ids + [PADDING] * padding])


@pytest.mark.parametrize("kind", KINDS)
def test_each_document_comes_out_as_if_alone(kind: str, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path, KINDS[kind]())
    tokens, doc_ids = packed_row()
    hidden = teacher.hidden_states(tokens, doc_ids)
    topk = teacher.top_k(tokens, 101, (), doc_ids=doc_ids)
    assert bool(torch.isfinite(hidden).all())
    plain = teacher.hidden_states(tokens)
    start = 0
    for length in LENGTHS:
        place = slice(start, start + length)
        alone = tokens[:, place]
        expected = teacher.hidden_states(alone)
        torch.testing.assert_close(hidden[:, place], expected, atol=1e-5, rtol=1e-5)
        assert start == 0 or not torch.allclose(plain[:, place], expected, atol=1e-2)
        log_p = teacher.model(alone, use_cache=False).logits.log_softmax(-1)
        said = torch.empty_like(log_p).scatter_(-1, topk.ids[:, place], topk.logprobs[:, place])
        torch.testing.assert_close(said, log_p, atol=1e-5, rtol=1e-5)
        start += length


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4),
        BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=2),
        # attention is masked, but a convolution reaches two tokens back
        Lfm2Config(**SHAPE, layer_types=["full_attention", "conv", "full_attention"]),
    ],
    ids=["recurrent", "no position ids", "one convolution"],
)
def test_architectures_that_mix_documents_are_refused(config: Any, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path, config)
    tokens, doc_ids = packed_row()
    assert bool(torch.isfinite(teacher.hidden_states(tokens)).all())
    with pytest.raises(DecantError, match=r"does not keep documents.*prepare\.document_mask=false"):
        teacher.hidden_states(tokens, doc_ids)


def test_a_documents_loss_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    """CE and KL, teacher and student both: between other documents, alone, and first of a row."""
    teacher = make_teacher(tmp_path, KINDS["llama"]())
    student = StudentModel(
        ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=101)
    )
    subject = torch.randint(0, 101, (1, 9))

    def losses(before: int, after: int, padding: int) -> tuple[float, float]:
        lengths = tuple(n for n in (before, 9, after) if n)
        tokens, doc_ids = packed_row(lengths, padding)
        place = slice(before, before + 9)
        tokens[:, place] = subject
        labels = next_token_labels(tokens, doc_ids, torch.ones_like(doc_ids, dtype=torch.bool))
        topk = teacher.top_k(tokens, 16, (2.0,), doc_ids=doc_ids)[:, place]
        wanted = labels[:, place] != IGNORE
        assert int(wanted.sum()) == 8
        sums = distillation_loss_sums(
            student.hidden_states(tokens, doc_ids)[:, place][wanted],
            student.head_weight,
            labels[:, place][wanted],
            topk[wanted],
            alpha=0.5,
            temperature=2.0,
        )
        return float(sums.ce), float(sums.divergence)

    alone = losses(0, 0, 0)
    for neighbours in ((7, 12, 0), (20, 3, 4), (0, 5, 1), (1, 0, 8)):
        assert losses(*neighbours) == pytest.approx(alone, abs=1e-4)
