"""Rotary frequencies, plain or stretched for contexts longer than the training context.

Dimension pair i of E / 2 turns by position * f_i. Plain RoPE has f_i = theta^(-2i / E) (Su et al.
2021, eq. 15): the first pairs turn fast and distinguish neighbours, the last hardly turn within a
whole context. A model that reads s times as far as in training would meet angles of the slow pairs
that it never saw. The variants below slow these pairs down by s, their `factor`; they differ in how
they treat the fast pairs.

Classes and fields have the names and defaults of `rope_parameters` in config.json, so that reading
and writing it is a copy; the numbers are those of `transformers.modeling_rope_utils`
(tests/model/test_rope.py). "dynamic" and "longrope" are not supported, because their frequencies
change with the length of the input, nor is "proportional", which none of our model's architectures
uses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.errors import DecantError


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """f_i / s for all pairs alike: positions are interpolated (Chen et al. 2023, eq. 4)."""

    rope_type: ClassVar[str] = "linear"
    factor: float

    def stretch(self, plain: Tensor, theta: float) -> Tensor:
        """Map plain frequencies [E / 2] to those of the longer context."""
        return plain / self.factor

    def amplitude(self) -> float:
        """Return the factor that cos and sin are multiplied by."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Scaling by how often a pair turns in the training context (Llama 3.1's `apply_scaling`).

    With r_i = original_max_position_embeddings * f_i / (2 pi) turns, and m_i rising linearly from 0
    at r_i = low_freq_factor to 1 at high_freq_factor:  f_i (m_i + (1 - m_i) / s).
    """

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def stretch(self, plain: Tensor, theta: float) -> Tensor:
        """Map plain frequencies [E / 2] to those of the longer context."""
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return plain * (kept + (1 - kept) / self.factor)

    def amplitude(self) -> float:
        """Return the factor that cos and sin are multiplied by."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Scaling that slows only slow pairs and sharpens attention (Peng et al. 2023, 3.2 and 3.4).

    f_i (m_i + (1 - m_i) / s), where m_i falls linearly over the PAIRS, as in the authors' code,
    from 1 at the pair that makes `beta_fast` turns within the training context to 0 at the pair
    that makes `beta_slow`; these two places are rounded outwards if `truncate` is set. Because
    softmax has more keys, logits must grow: cos and sin are multiplied by `attention_factor`,
    sqrt(1 / t) = 0.1 ln(s) + 1.
    """

    rope_type: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def stretch(self, plain: Tensor, theta: float) -> Tensor:
        """Map plain frequencies [E / 2] to those of the longer context."""
        pairs = len(plain)

        def place(turns: float) -> float:  # the pair that makes this many turns
            length = self.original_max_position_embeddings
            return pairs * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

        first, last = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        width = (last - first) or 0.001
        kept = 1 - ((torch.arange(pairs, device=plain.device) - first) / width).clamp(0, 1)
        return plain * (kept + (1 - kept) / self.factor)

    def amplitude(self) -> float:
        """Return the factor that cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor

        def root(scale: float) -> float:
            return 0.1 * scale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:  # DeepSeek's variant
            return root(self.mscale) / root(self.mscale_all_dim)
        return root(1.0)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling
_VARIANTS = (LinearScaling, Llama3Scaling, YarnScaling)


def inverse_frequencies(head_size: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Return f_i, float32 [E / 2]: the radians that each pair turns per position."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    plain: Tensor = 1.0 / theta**exponents
    return plain if scaling is None else scaling.stretch(plain, theta)


def read_scaling(parameters: Mapping[str, Any], original_max_len: int) -> RopeScaling | None:
    """Return the variant that `rope_parameters` (formerly `rope_scaling`) describes.

    Args:
        original_max_len: used if original_max_position_embeddings is missing.

    Raises:
        DecantError: the variant is unknown, or one of its fields is unknown, missing or out of
            range.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    given = {
        name: value
        for name, value in parameters.items()
        if name not in ("rope_type", "type", "rope_theta") and value is not None
    }
    variants = {variant.rope_type: variant for variant in _VARIANTS}
    if kind not in ("default", *variants):
        raise DecantError(
            f"rope type={kind!r}: the student supports 'default', {str(list(variants))[1:-1]}"
        )
    known = {field.name: field for field in fields(variants[kind])} if kind in variants else {}
    if unknown := given.keys() - known.keys():
        name = min(unknown)
        raise DecantError(f"{name}={given[name]!r} for rope type={kind!r}, which the student lacks")
    if "original_max_position_embeddings" in known:
        given.setdefault("original_max_position_embeddings", original_max_len)
    required = {name for name, field in known.items() if field.default is MISSING}
    if missing := required - given.keys():
        raise DecantError(f"no {min(missing)} for rope type={kind!r}, which needs it")
    if given.get("factor", 1.0) < 1.0:
        raise DecantError(f"factor={given['factor']} for rope type={kind!r}: it must be at least 1")
    return variants[kind](**given) if kind in variants else None


def rope_parameters(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return `rope_parameters` as Hugging Face reads them; the inverse of `read_scaling`."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    given = {name: value for name, value in asdict(scaling).items() if value is not None}
    return {"rope_type": scaling.rope_type, "rope_theta": theta, **given}
