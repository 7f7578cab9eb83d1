"""The results of a part of the study: comparisons with their limits, and what explains them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ATOL = 1e-5
"""Largest accepted difference in float32 for values of order 1."""


@dataclass(frozen=True)
class Comparison:
    """One number of ours against Hugging Face's.

    Attributes:
        measured: largest absolute difference, or the number of things that differ.
        limit: largest accepted value; 0 if the two must be equal.
        shape: of the tensors compared; empty for other things.
    """

    name: str
    measured: float
    limit: float
    shape: tuple[int, ...] = ()

    @property
    def passed(self) -> bool:
        return math.isfinite(self.measured) and self.measured <= self.limit


@dataclass(kw_only=True)
class Part:
    """What one part of the study found."""

    name: str  # of PART_NAMES
    title: str
    notes: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    tables: dict[str, Sequence[Sequence[object]]] = field(default_factory=dict)  # header first
    texts: dict[str, str] = field(default_factory=dict)  # preformatted
    files: dict[str, bytes] = field(default_factory=dict)  # to write beside the report

    @property
    def failed(self) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if not comparison.passed]


def compare(name: str, ours: Tensor, theirs: Tensor, atol: float = ATOL) -> Comparison:
    """Compare two tensors of equal shape [..., N]: the largest absolute difference by vector.

    A vector of N may differ by `atol`, or, if its largest absolute value in `theirs` exceeds 1, by
    `atol` times that value, since float32 keeps 24 bits whatever the size. Each vector has its own
    limit, because real models make the first position's hidden state a thousand times as large as
    all others, and its limit would hide their mistakes. The result is for the vector that comes
    nearest to its limit. Tensors of different shapes differ by infinity.
    """
    if ours.shape != theirs.shape:
        return Comparison(name, float("inf"), atol, tuple(ours.shape))
    ours, theirs = (tensor.detach().to("cpu", torch.float64) for tensor in (ours, theirs))
    apart = (ours - theirs).abs().amax(-1).flatten()
    limits = atol * theirs.abs().amax(-1).flatten().clamp(min=1.0)
    equal = bool((apart == 0).all())
    worst = int(limits.argmin() if equal else (apart / limits).argmax())  # the first NaN, if any
    return Comparison(name, float(apart[worst]), float(limits[worst]), tuple(ours.shape))


def compare_sequences(name: str, ours: Sequence[int], theirs: Sequence[int]) -> Comparison:
    """Count the places at which two sequences of ids differ, including any surplus ids."""
    differ = sum(a != b for a, b in zip(ours, theirs, strict=False))
    return Comparison(name, differ + abs(len(ours) - len(theirs)), 0)


def shown(value: float) -> str:
    """Format a difference or limit; exactly 0 becomes "0"."""
    return "0" if value == 0.0 else f"{value:.1e}"


def shape_of(tensor: Tensor) -> str:
    """Format a shape for a table."""
    return " x ".join(map(str, tensor.shape))


def largest(tensor: Tensor) -> str:
    """Format the largest absolute value for a table."""
    return f"{float(tensor.abs().max()):.4g}"
