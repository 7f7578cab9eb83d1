"""The head that is read alone, against that of the loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from pipeline.errors import DecantError
from pipeline.model.head import load_head
from tests.models import make_teacher

FLOAT32 = torch.float32


@pytest.mark.parametrize("dtype", [FLOAT32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_models_own(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    make_teacher(tmp_path, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    head = load_head(tmp_path, dtype)
    assert head.weight.dtype == dtype
    assert torch.equal(head.weight, model.lm_head.weight)
    assert head.bias is None
    assert head.num_parameters == model.num_parameters()


def test_a_bias_and_several_files(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64}
    model = PhiForCausalLM(
        PhiConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=False)
    )
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    head = load_head(tmp_path, FLOAT32)
    assert torch.equal(head.weight, model.lm_head.weight)
    assert head.bias is not None
    assert torch.equal(head.bias, model.lm_head.bias)


def change_tensors(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file, metadata={"format": "pt"})


def test_names_with_another_prefix(tmp_path: Path) -> None:
    make_teacher(tmp_path)
    wanted = load_head(tmp_path, FLOAT32).weight
    change_tensors(tmp_path, lambda t: {f"language_{name}": value for name, value in t.items()})
    assert torch.equal(load_head(tmp_path, FLOAT32).weight, wanted)


def test_a_head_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    make_teacher(tmp_path, tie_word_embeddings=False)
    change_tensors(tmp_path, lambda t: t | {"lm_head.weight": t["lm_head.weight"].to(torch.int8)})
    said = r"stores its head as lm_head\.weight, \(320, 64\) in torch\.int8, and not as \(320, 64\)"
    with pytest.raises(DecantError, match=said):
        load_head(tmp_path, FLOAT32)
    change_tensors(tmp_path, lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
    with pytest.raises(DecantError, match=r"holds no tensor lm_head\.weight, which would be its "):
        load_head(tmp_path, FLOAT32)
