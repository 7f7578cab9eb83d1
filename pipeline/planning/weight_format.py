"""The bits per weight of quantised checkpoints, scales included.

The format is read from `quantization_config` of a config.json, or else from the end of a model's
name. Embedding, head, norms and routers are assumed to be in half precision, as in the published
checkpoints. Per weight, with the scales of a group of g weights:

    fp8         8 bits and a float32 scale per block of 128 x 128 (Qwen3-*-FP8, DeepSeek-V3)
    mxfp4       4 bits and an 8-bit exponent per 32 weights, of the experts alone (OCP Microscaling
                Formats specification 1.0; gpt-oss)
    awq, gptq   b bits, and per group a float16 scale and a zero point of b bits (AutoAWQ's and
                AutoGPTQ's packing); g = 128 unless the config says otherwise
    bitsandbytes  4 bits and a float32 scale per 64 weights (nf4, fp4), or with double quantisation
                an 8-bit scale per 64 and a float32 per 256 of these (Dettmers et al. 2023, QLoRA,
                section 3); or 8 bits (LLM.int8(), a scale per row)
    compressed-tensors, torchao  their num_bits or the number in the type's name, and a 16-bit
                scale per group, if there are groups

The products themselves are assumed to run at the rate of half precision: most of these formats are
converted to it within the kernel, and units for FP8 or FP4 are not counted on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DecantError
from pipeline.model.config_json import quantization_config

_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How the matrices of a quantised checkpoint are stored."""

    name: str
    bits: float  # per weight
    experts_only: bool = False  # other linear layers are not quantised
    capability: tuple[int, int] | None = None
    """CUDA compute capability below which transformers does not compute with these weights
    (`validate_environment` of its quantizers); None if it does on any device."""

    def describe(self) -> str:
        """Describe the format, for example "linear layers fp8 at 8 bits"."""
        where = "experts" if self.experts_only else "linear layers"
        return f"{where} {self.name} at {self.bits:.3g} bits"


FP8 = WeightFormat(name="fp8", bits=8 + 32 / 128**2, capability=_FP8_CAPABILITY)
MXFP4 = WeightFormat(name="mxfp4", bits=4 + 8 / 32, experts_only=True, capability=(7, 5))
NF4 = WeightFormat(name="bitsandbytes nf4", bits=4 + 32 / 64)
NF4_DOUBLE = WeightFormat(name="bitsandbytes nf4", bits=4 + 8 / 64 + 32 / (64 * 256))
INT8 = WeightFormat(name="bitsandbytes int8", bits=8)


def _grouped(name: str, bits: int, group: int) -> WeightFormat:
    """Return a format with a float16 scale and a zero point per group of weights."""
    each = bits + (16 + bits) / group if group > 0 else bits  # -1: one group per row
    return WeightFormat(name=f"{name} int{bits}", bits=each)


_SUFFIXES: dict[str, WeightFormat | None] = {
    "-FP8": FP8,
    "-AWQ": _grouped("awq", 4, 128),
    "-GPTQ-Int4": _grouped("gptq", 4, 128),
    "-GPTQ-Int8": _grouped("gptq", 8, 128),
    "-bnb-4bit": NF4_DOUBLE,
    "-BF16": None,  # gpt-oss, dequantised
}


def split_name(name: str) -> tuple[str, WeightFormat | None, bool]:
    """Split the format from the end of a model's name.

    Returns:
        the name without it, the format, and whether the name says one ("-BF16" says none).
    """
    for suffix, found in _SUFFIXES.items():
        if name.lower().endswith(suffix.lower()):
            return name[: -len(suffix)], found, True
    return name, None, False


def read_format(config: Mapping[str, Any]) -> WeightFormat | None:
    """Read the format from a config.json, which may hold it within text_config.

    Raises:
        DecantError: the weights are quantised in a way whose size is not known here.
    """
    found = quantization_config(config)
    if found is None:
        return None
    method, settings = found
    try:
        known = _by_method(method, settings)
    except (LookupError, TypeError, ValueError, AttributeError):
        known = None
    if known is None:
        raise DecantError(
            f"the model is quantised by {method} in a way whose size a plan does not know: plan "
            "for the unquantised model, and expect less memory"
        )
    return known


def _by_method(method: str, config: Mapping[str, Any]) -> WeightFormat | None:
    if method == "fp8":
        return FP8
    if method == "mxfp4":
        return MXFP4
    if method in ("awq", "gptq"):
        return _grouped(method, int(config.get("bits", 4)), int(config.get("group_size", 128)))
    if method == "bitsandbytes":
        if config.get("load_in_8bit"):
            return INT8
        return NF4_DOUBLE if config.get("bnb_4bit_use_double_quant") else NF4
    if method == "compressed-tensors":
        return _compressed(config)
    return _torchao(config) if method == "torchao" else None


def _compressed(config: Mapping[str, Any]) -> WeightFormat:
    weights, *_ = (group["weights"] for group in config["config_groups"].values())
    bits, kind = int(weights["num_bits"]), weights["type"]
    return _scaled(
        f"compressed-tensors {kind}{bits}",
        bits,
        int(weights.get("group_size") or 0),
        _FP8_CAPABILITY if kind == "float" else None,
    )


def _torchao(config: Mapping[str, Any]) -> WeightFormat | None:
    kind: Any = config["quant_type"]
    kind = kind["default"] if isinstance(kind, Mapping) else kind
    name, data = (kind["_type"], kind["_data"]) if isinstance(kind, Mapping) else (kind, {})
    number = re.search(r"(?:int|float)(\d)", name, re.IGNORECASE)
    return number and _scaled(
        f"torchao {name.removesuffix('Config')}",
        int(number[1]),
        int(data.get("group_size") or 0),
        _FP8_CAPABILITY if "float" in name.lower() else None,
    )


def _scaled(name: str, bits: int, group: int, capability: tuple[int, int] | None) -> WeightFormat:
    """Return a format with a 16-bit scale per group of weights, or per row if there is no group."""
    each = bits + (16 / group if group > 0 else 0)
    return WeightFormat(name=name, bits=each, capability=capability)
