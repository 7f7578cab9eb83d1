"""Shapes of models used in recipes, by name. The table only saves a request to the hub."""

from __future__ import annotations

import re
from dataclasses import replace

from pipeline.planning.decoder_shape import Experts, Shape
from pipeline.planning.weight_format import MXFP4, split_name


def _qwen2(sizes: tuple[int, int, int, int, int], vocab_size: int, *, tied: bool) -> Shape:
    hidden, layers, heads, kv_heads, intermediate = sizes
    return Shape(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=hidden // heads,
        intermediate_size=intermediate,
        vocab_size=vocab_size,
        tied=tied,
        qkv_bias=True,
        model_type="qwen2",
    )


def _smollm(sizes: tuple[int, int, int, int, int]) -> Shape:
    return replace(_qwen2(sizes, 49_152, tied=True), qkv_bias=False, model_type="llama")


def _qwen3(sizes: tuple[int, int, int, int, int], *, tied: bool) -> Shape:
    shape = _qwen2(sizes, 151_936, tied=tied)
    return replace(shape, head_size=128, qkv_bias=False, qk_norm=True, model_type="qwen3")


def _gpt_oss(layers: int, experts: int) -> Shape:
    return replace(
        _qwen2((2880, layers, 64, 8, 2880), 201_088, tied=False),
        head_size=64,
        o_bias=True,
        sinks=True,
        experts=Experts(number=experts, per_token=4, biased=True),
        model_type="gpt_oss",
        weight_format=MXFP4,
    )


KNOWN = {
    "Qwen2.5-0.5B": _qwen2((896, 24, 14, 2, 4864), 151_936, tied=True),
    "Qwen2.5-1.5B": _qwen2((1536, 28, 12, 2, 8960), 151_936, tied=True),
    "Qwen2.5-3B": _qwen2((2048, 36, 16, 2, 11_008), 151_936, tied=True),
    "Qwen2.5-7B": _qwen2((3584, 28, 28, 4, 18_944), 152_064, tied=False),
    "Qwen2.5-14B": _qwen2((5120, 48, 40, 8, 13_824), 152_064, tied=False),
    "Qwen2.5-32B": _qwen2((5120, 64, 40, 8, 27_648), 152_064, tied=False),
    "Qwen3-0.6B": _qwen3((1024, 28, 16, 8, 3072), tied=True),
    "Qwen3-1.7B": _qwen3((2048, 28, 16, 8, 6144), tied=True),
    "Qwen3-4B": _qwen3((2560, 36, 32, 8, 9728), tied=True),
    "Qwen3-8B": _qwen3((4096, 36, 32, 8, 12_288), tied=False),
    "Qwen3-14B": _qwen3((5120, 40, 40, 8, 17_408), tied=False),
    "Qwen3-32B": _qwen3((5120, 64, 64, 8, 25_600), tied=False),
    "Qwen3-30B-A3B": replace(
        _qwen3((2048, 48, 32, 4, 768), tied=False),
        experts=Experts(number=128, per_token=8),
        model_type="qwen3_moe",
    ),
    "gpt-oss-20b": _gpt_oss(layers=24, experts=32),
    "gpt-oss-120b": _gpt_oss(layers=36, experts=128),
    "SmolLM2-135M": _smollm((576, 30, 9, 3, 1536)),
    "SmolLM2-360M": _smollm((960, 32, 15, 5, 2560)),
    "SmolLM2-1.7B": _smollm((2048, 24, 32, 32, 8192)),
}
"""Shapes by name without the words in `_SAME_SHAPE` and without a quantised format."""

_SAME_SHAPE = re.compile(r"-(Coder|Instruct|Thinking|Base|2507)(?=-|$)")


def known(name: str) -> Shape | None:
    """Return a model's shape by hub id, folder or file name; None if it is not in the table."""
    plain = name.rpartition("/")[2]
    if plain.endswith(".gguf"):  # dequantised by `fetch`
        plain = _SAME_SHAPE.sub("", plain)
        key = next((key for key in KNOWN if plain.startswith((f"{key}.", f"{key}-"))), None)
        return replace(KNOWN[key], weight_format=None) if key else None
    plain, weight_format, said = split_name(plain)
    shape = KNOWN.get(_SAME_SHAPE.sub("", plain))
    return replace(shape, weight_format=weight_format) if shape and said else shape
