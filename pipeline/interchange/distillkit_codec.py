"""The compressed log-probabilities of DistillKit (arcee-ai/distillkit), decoded.

Written from the behaviour of distillkit/compression at commit a61c2e7 (2026-03-14), version 1. All
its captures keep the K most probable ids of each position, in one of three forms:

    raw         `token_ids`, `top_values`: ids and log-probabilities as they are
    compressed  `bytepacked_indices`: each id in b = ceil(log2 d) bits, most significant bit first,
                one after another, filled up with zeros to a whole byte; `compressed_logprobs`:
                bytes, in this order

                    the first exact_k values in exact_dtype
                    one coefficient per polynomial term, in term_dtype
                    for each residual bin: a scale in scale_dtype, then num_elements integers of
                    element_bits each, packed like the ids

    legacy      `packed_indices`: ids of ceil(log2 vocab_size) bits, as many in each 64-bit integer
                as fit whole, the first in the lowest bits; `exact_values`: the first exact_k
                values; `coeffs`: one coefficient per term

Compressed. Value exact_k + i is the sum of coefficient times term at t_i, plus the residual. A term
n is t^n, `sqrt` and `exp` are these functions of t, and t_i is i, or i / (K - exact_k - 1) with
normalize_t. A residual is the integer plus the smallest one, -2^(bits - 1), times the scale; with
one bit it is minus or plus the scale, and values beyond all bins have none. With delta_encoding the
values are differences, and the log-probabilities their cumulative sum.

Legacy. Value exact_k + i is the sum of coefficient times term at t = i + 1; the terms are t^0, t^-1
and so on up to polynomial_degree (t^1, t^2 if invert_polynomial is false), then sqrt t with
with_sqrt_term.

All floats are little-endian. Sums are evaluated in the formats in which DistillKit evaluates them,
so that the values are its own, bit for bit. What it does not guarantee, but a cache needs, is made
by `pipeline/interchange/distillkit.py`: descending order, and a mass of at most 1.

Shapes: n positions, K kept ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from pipeline.config.params_file import load_yaml
from pipeline.config.section import Count, CountOrZero, Section
from pipeline.errors import ParamsError
from pipeline.io.checked_json import DamagedError
from pipeline.io.files import open_file
from pipeline.runtime.device import DTYPES

FloatFormat = Literal["float16", "bfloat16", "float32", "float64"]
Bits = Annotated[int, Field(ge=1, le=32)]  # DistillKit takes up to 64, which no residual needs
NumIds = Annotated[int, Field(ge=2, le=2**32)]
_FORMATS = {**DTYPES, "float64": torch.float64}
_MAX_BYTES = 2**20


class ResidualBin(Section):
    """Neighbouring residuals that share a scale."""

    scale_dtype: FloatFormat
    element_bits: Bits
    num_elements: Count


class Compression(Section):
    """How `compressed_logprobs` and `bytepacked_indices` are written, by DistillKit's own keys."""

    d: NumIds
    """Number of ids of the teacher's distribution."""
    k: Count
    exact_k: CountOrZero
    exact_dtype: FloatFormat = "float32"
    polynomial_terms: tuple[int | Literal["sqrt", "exp"], ...] | None = None
    term_dtype: FloatFormat = "float32"
    residual_bins: tuple[ResidualBin, ...]
    delta_encoding: bool = True
    error_diffusion: bool = False
    """How the residuals were rounded, which decoding need not know."""
    normalize_t: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k={self.exact_k} exceeds k={self.k}")
        if sum(one.num_elements for one in self.residual_bins) > self.k - self.exact_k:
            raise ValueError("residual_bins hold more elements than k - exact_k")
        if self.exact_k < self.k and not self.polynomial_terms and not self.residual_bins:
            raise ValueError(
                "neither polynomial_terms nor residual_bins describe k - exact_k values"
            )
        return self

    @property
    def num_ids(self) -> int:
        """Number of ids of the teacher's distribution."""
        return self.d

    @property
    def bytes_of_ids(self) -> int:
        """Length of a position's `bytepacked_indices`."""
        return -(-self.k * bits_of_ids(self.d) // 8)

    @property
    def bytes_of_values(self) -> int:
        """Length of a position's `compressed_logprobs`."""
        size = self.exact_k * _FORMATS[self.exact_dtype].itemsize
        size += len(self.polynomial_terms or ()) * _FORMATS[self.term_dtype].itemsize
        for one in self.residual_bins:
            size += _FORMATS[one.scale_dtype].itemsize + -(
                -one.num_elements * one.element_bits // 8
            )
        return size

    def decode(self, ids: NDArray[Any], values: NDArray[Any]) -> tuple[NDArray[Any], Tensor]:
        """Decode uint8 arrays [n, bytes]: ids int64 [n, K], log-probabilities float [n, K].

        Raises:
            DamagedError: a position has another number of bytes than this configuration says.
        """
        _require_width("bytepacked_indices", ids, self.bytes_of_ids)
        _require_width("compressed_logprobs", values, self.bytes_of_values)
        return unpack_bits(ids, bits_of_ids(self.d), self.k), self._logprobs(values)

    def _logprobs(self, packed: NDArray[Any]) -> Tensor:
        out, num_rest = _FORMATS[self.exact_dtype], self.k - self.exact_k
        parts = _Parts(packed)
        exact = parts.floats(self.exact_k, out)
        coefficients = parts.floats(len(self.polynomial_terms or ()), _FORMATS[self.term_dtype])
        residuals = [self._residuals(parts, one) for one in self.residual_bins]
        found = torch.cat(residuals, -1) if residuals else torch.zeros(len(packed), 0)
        rest = torch.nn.functional.pad(found, (0, num_rest - found.shape[-1])).to(out)
        if self.polynomial_terms:
            terms = self._terms(num_rest)
            rest = (terms * coefficients[:, None, :]).sum(-1) + rest
        values = torch.cat((exact, rest), -1)
        return values.float().cumsum(-1).to(out) if self.delta_encoding else values

    def _residuals(self, parts: _Parts, one: ResidualBin) -> Tensor:
        scale = parts.floats(1, _FORMATS[one.scale_dtype])
        found = torch.from_numpy(parts.integers(one.num_elements, one.element_bits))
        if one.element_bits == 1:
            steps = found.float() * 2.0 - 1.0
        else:
            steps = (found - 2 ** (one.element_bits - 1)).float()
        return steps * scale

    def _terms(self, number: int) -> Tensor:
        """Return each term at each t, [number, terms]."""
        dtype = _FORMATS[self.term_dtype]
        t = torch.linspace(0, 1, number, dtype=dtype) if self.normalize_t else None
        t = torch.arange(number, dtype=dtype) if t is None else t
        functions = {"sqrt": torch.sqrt, "exp": torch.exp}
        columns = [
            t**term if isinstance(term, int) else functions[term](t)
            for term in self.polynomial_terms or ()
        ]
        return torch.stack(columns, -1)


class LegacyCompression(Section):
    """How `packed_indices`, `exact_values` and `coeffs` are written, by DistillKit's own keys."""

    vocab_size: NumIds
    k: Count
    exact_k: CountOrZero
    polynomial_degree: CountOrZero
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: FloatFormat = "float32"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k={self.exact_k} exceeds k={self.k}")
        return self

    @property
    def num_ids(self) -> int:
        """Number of ids of the teacher's distribution."""
        return self.vocab_size

    def decode(
        self, packed: NDArray[Any], exact: NDArray[Any], coefficients: NDArray[Any]
    ) -> tuple[NDArray[Any], Tensor]:
        """Decode arrays [n, ...]: ids int64 [n, K], log-probabilities float32 [n, K].

        Raises:
            DamagedError: a position has another number of values than this configuration says.
        """
        bits = bits_of_ids(self.vocab_size)
        each = 64 // bits
        _require_width("packed_indices", packed, -(-self.k // each))
        _require_width("exact_values", exact, self.exact_k)
        shifts = bits * np.arange(each, dtype=np.uint64)
        ids = (packed.astype(np.uint64)[..., None] >> shifts) & np.uint64(2**bits - 1)
        ids = ids.reshape(len(packed), -1)[:, : self.k].astype(np.int64)
        values = torch.from_numpy(exact.astype(np.float32))
        if self.exact_k < self.k:
            terms = self._terms(self.k - self.exact_k)
            _require_width("coeffs", coefficients, terms.shape[-1])
            weights = torch.from_numpy(coefficients.astype(np.float32))
            values = torch.cat((values, (terms * weights[:, None, :]).sum(-1)), -1)
        return ids, values

    def _terms(self, number: int) -> Tensor:
        """Return each term at t = 1, 2, ..., [number, terms]."""
        t = torch.arange(number, dtype=torch.float32) + 1
        sign = -1 if self.invert_polynomial else 1
        columns = [t ** (sign * power) for power in range(self.polynomial_degree + 1)]
        return torch.stack([*columns, *([t.sqrt()] if self.with_sqrt_term else [])], -1)


AnyCompression = Compression | LegacyCompression


def read_compression(file: Path) -> AnyCompression:
    """Read a compression_config.yaml, as a capture of DistillKit writes it, or a training config.

    Of the latter only `teacher.logprob_compressor` or `teacher.legacy_logit_compression` is read.

    Raises:
        ParamsError: the file cannot be read or describes no compression; the message says where.
    """
    try:
        with open_file(file) as stream:
            content = load_yaml(stream.read(_MAX_BYTES).decode())
    except OSError as error:
        raise ParamsError(
            f"{file} cannot be read ({error.strerror}): name the capture's configuration by "
            "--compression"
        ) from None
    except ValueError as error:
        raise ParamsError(f"{file} cannot be read as YAML ({error}): correct it") from None
    if isinstance(content, dict) and isinstance(content.get("teacher"), dict):
        content = content["teacher"]
    kind: type[AnyCompression] = Compression
    if isinstance(content, dict):
        is_legacy = bool(content.keys() & {"legacy_logit_compression", "polynomial_degree"})
        kind = LegacyCompression if is_legacy else Compression
        key = "legacy_logit_compression" if is_legacy else "logprob_compressor"
        content = content.get(key, content)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ParamsError(
            f"{file} describes no compression of DistillKit's, {where}: {first['msg']}: give the "
            "configuration that the capture was made with"
        ) from None


def bits_of_ids(number: int) -> int:
    """Return ceil(log2 of a number of ids), in float32 as DistillKit computes it."""
    return int(np.ceil(np.log2(np.float32(number))))


def unpack_bits(packed: NDArray[Any], bits: int, number: int) -> NDArray[np.int64]:
    """Return the integers of `bits` bits each that lie in bytes, most significant bit first.

    Args:
        packed: uint8 [n, ceil(number * bits / 8)].

    Returns:
        int64 [n, number].
    """
    wide = np.zeros((len(packed), number, 32), np.uint8)
    flat = np.unpackbits(packed, axis=-1, count=number * bits)
    wide[..., 32 - bits :] = flat.reshape(len(packed), number, bits)
    found: NDArray[np.int64] = np.packbits(wide, axis=-1).view(">u4")[..., 0].astype(np.int64)
    return found


class _Parts:
    """The bytes [n, bytes] of `compressed_logprobs`, from which one part after another is taken."""

    def __init__(self, packed: NDArray[Any]) -> None:
        self._rest = packed

    def floats(self, number: int, dtype: torch.dtype) -> Tensor:
        """Return the next floats, [n, number]."""
        data = torch.from_numpy(self._take(number * dtype.itemsize))
        return data.view(dtype) if number else torch.empty(len(data), 0, dtype=dtype)

    def integers(self, number: int, bits: int) -> NDArray[np.int64]:
        """Return the next packed integers, [n, number]."""
        return unpack_bits(self._take(-(-number * bits // 8)), bits, number)

    def _take(self, size: int) -> NDArray[Any]:
        part, self._rest = self._rest[:, :size], self._rest[:, size:]
        return part.copy()  # writable, and of its own alignment


def _require_width(name: str, values: NDArray[Any], wanted: int) -> None:
    if values.shape[1] != wanted:
        raise DamagedError(
            f"its {name} hold {values.shape[1]} entries per position where the compression's "
            f"configuration makes {wanted}"
        )
