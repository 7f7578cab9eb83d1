"""Frequencies and attention factors against transformers' own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.errors import DecantError
from pipeline.model.decoder import RotaryEmbedding
from pipeline.model.rope import inverse_frequencies, read_scaling
from pipeline.model.weights import load_student, read_config, save_student
from tests.models import DECODER

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
VARIANTS = [
    {"rope_type": "linear", "factor": 3.0},
    LLAMA3,
    LLAMA3 | {"factor": 32.0},  # Llama 3.2
    YARN,  # as in Qwen2.5's README
    YARN | {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    YARN | {"attention_factor": 0.7},
    YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8},
    {"rope_type": "yarn", "factor": 2.0},  # the context of config.json is the original one
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12},
]


@pytest.mark.parametrize("theta", [10_000.0, 1e6])
@pytest.mark.parametrize("parameters", VARIANTS)
def test_numbers_equal_transformers(parameters: dict[str, Any], theta: float) -> None:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters=parameters | {"rope_theta": theta},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    scaling = read_scaling(parameters, 4096)
    assert scaling is not None
    found = inverse_frequencies(64, theta, scaling)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    assert scaling.amplitude() == pytest.approx(factor, abs=1e-6)
    assert not torch.allclose(found, inverse_frequencies(64, theta, None), rtol=1e-3)


@pytest.mark.parametrize("parameters", VARIANTS)
def test_logits_equal_hugging_face_and_go_back_there(
    parameters: dict[str, Any], tmp_path: Path
) -> None:
    rope = parameters | {"rope_theta": 1e4}
    if "original_max_position_embeddings" in rope:  # so small that positions differ much
        rope["original_max_position_embeddings"] = 16
    theirs = LlamaForCausalLM(LlamaConfig(**DECODER, rope_parameters=rope)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_student(tmp_path / "theirs").eval()
    tokens = torch.randint(0, 257, (2, 48))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    save_student(ours, tmp_path / "ours", tokenizer_from=None)
    assert read_config(tmp_path / "ours") == ours.config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(again(tokens).logits, ours(tokens), atol=1e-5, rtol=1e-5)


def test_yarn_switched_on_as_qwen_says_reads_four_times_as_far(tmp_path: Path) -> None:
    theirs = LlamaForCausalLM(LlamaConfig(**DECODER))
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": scaling}))
    assert raw["max_position_embeddings"] == 64
    assert read_config(tmp_path).max_seq_len == 256


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope type='dynamic': the student supports"),
        ({"type": "longrope"}, "rope type='longrope'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 for"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "beta_fast=3 for rope type='lin"),
        ({"rope_type": "llama3", "factor": 2.0}, "no high_freq_factor for rope type='llama3'"),
        (
            {"rope_type": "yarn", "factor": 0.5},
            "factor=0.5 for rope type='yarn': it must be at least 1",
        ),
    ],
)
def test_other_variants_are_named(parameters: dict[str, Any], message: str, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**DECODER)).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_parameters": parameters}))
    with pytest.raises(DecantError, match=message):
        read_config(tmp_path)


def test_frequencies_stay_float32_in_a_half_precision_model() -> None:
    rotary = RotaryEmbedding(64, 1e6)
    before = rotary.inv_freq.clone()
    rotary.to(torch.bfloat16)
    assert torch.equal(rotary.inv_freq, before)
    with torch.device("meta"):
        empty = RotaryEmbedding(64, 1e6)
    assert torch.equal(empty.to_empty(device="cpu").inv_freq, before)
