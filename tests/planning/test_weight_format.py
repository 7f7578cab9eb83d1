"""Formats of quantised weights: bits worked by hand, sizes against published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DecantError
from pipeline.planning.known_shapes import KNOWN, known
from pipeline.planning.shapes import teacher_shape
from pipeline.planning.weight_format import read_format
from tests.planning.test_shapes import SIZES, of_teacher


@pytest.mark.parametrize(
    ("config", "name", "bits"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8.002),
        ({"quant_method": "mxfp4"}, "mxfp4", 4.25),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq int4", 4.156),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq int4", 4.625),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "gptq int8", 8.0),
        ({"load_in_4bit": True}, "bitsandbytes nf4", 4.5),
        (
            {"quant_method": "bitsandbytes", "bnb_4bit_use_double_quant": True},
            "bitsandbytes nf4",
            4.127,
        ),
        ({"load_in_8bit": True}, "bitsandbytes int8", 8.0),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}
                },
            },
            "compressed-tensors int4",
            4.125,
        ),
        (
            {
                "quant_method": "torchao",
                "quant_type": {
                    "default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}
                },
            },
            "torchao Int4WeightOnly",
            4.25,
        ),
        (
            {"quant_method": "torchao", "quant_type": "Float8WeightOnlyConfig"},
            "torchao Float8WeightOnly",
            8.0,
        ),
    ],
)
def test_bits_of_a_weight_with_its_scales(config: dict[str, Any], name: str, bits: float) -> None:
    for place in (
        {"quantization_config": config},
        {"text_config": {"quantization_config": config}},
    ):
        found = read_format(place)
        assert found is not None
        assert found.name == name
        assert found.bits == pytest.approx(bits, abs=1e-3)
        assert found.experts_only == (name == "mxfp4")
    assert read_format({}) is None


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "quip"},
        {"quant_method": "torchao", "quant_type": "strange"},
        {"quant_method": "torchao"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "gptq", "bits": "four"},
    ],
)
def test_a_format_of_unknown_size_is_one_sentence(config: dict[str, Any]) -> None:
    with pytest.raises(DecantError, match=r"quantised by .* whose size a plan does not know"):
        read_format({"quantization_config": config})


def test_bytes_are_those_of_the_published_files() -> None:
    """12.8 and 60.8 GiB are given in gpt-oss's model card (2025), table 1."""
    for name, size in (("openai/gpt-oss-20b", 12.8), ("openai/gpt-oss-120b", 60.8)):
        shape = known(name)
        assert shape is not None
        assert shape.weight_bytes(2) == pytest.approx(size * 2**30, rel=5e-3)
    plain = KNOWN["Qwen3-32B"]
    assert plain.weight_bytes(2) == 2 * plain.parameters
    quantised = known("Qwen/Qwen3-32B-FP8")
    assert quantised is not None
    rest = plain.parameters - plain.linear_matrices  # embedding, head and norms stay as they are
    assert quantised.weight_bytes(2) == pytest.approx(plain.linear_matrices + 2 * rest, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "format_name"),
    [
        ("Qwen/Qwen3-32B-FP8", "fp8"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", "fp8"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "awq int4"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8", "gptq int8"),
        ("unsloth/Qwen3-8B-bnb-4bit", "bitsandbytes nf4"),
        ("unsloth/gpt-oss-20b-BF16", None),
        ("openai/gpt-oss-20b", "mxfp4"),
        ("Qwen/Qwen3-8B-Base", None),
        ("models/Qwen3-8B-Q4_K_M.gguf", None),
    ],
)
def test_a_name_says_the_format(name: str, format_name: str | None) -> None:
    shape = known(name)
    assert shape is not None
    assert (shape.weight_format and shape.weight_format.name) == format_name
    assert known("models/none-of-these.gguf") is None


def test_a_config_at_hand_says_more_than_a_name(tmp_path: Path) -> None:
    config = SIZES | {"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    hub = {"id": "Qwen/Qwen3-8B-AWQ", "revision": "main"}
    _, shape = teacher_shape(of_teacher(source="hub", hub=hub), tmp_path)
    assert shape.weight_format is not None
    assert shape.weight_format.name == "fp8"
