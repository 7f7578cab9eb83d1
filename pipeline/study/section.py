"""The output of a part of the study: a title, prose, tables, pictures and comparisons.

A `Comparison` is the unit of the study: one number of ours against Hugging Face's, with the
tolerance that it has to meet. Everything else explains what was compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ATOL = 1e-5
"""Largest accepted difference in float32 for values of order 1."""


@dataclass(frozen=True)
class Comparison:
    """Ours against Hugging Face's: passed if `difference <= tolerance` and it is finite.

    Attributes:
        difference: largest absolute difference, or the number of things that differ.
        tolerance: 0 if the two must be equal.
    """

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.difference) and self.difference <= self.tolerance


@dataclass(frozen=True)
class Table:
    """A table with cells as shown; `folded` tables are long and start closed in HTML."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """Panels side by side; each function draws into the matplotlib axes it is given."""

    name: str  # name of its file
    caption: str
    panels: Sequence[Callable[[Any], None]]
    inches: tuple[float, float] | None = None  # size of one panel; None: the usual size


@dataclass
class Section:
    """One part of the study."""

    name: str  # name for `--part`
    title: str
    prose: list[str] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)  # title and preformatted text
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)  # files to write beside the report


def shown(value: float) -> str:
    """Format a difference or tolerance for a table; exactly 0 becomes "0"."""
    return "0" if value == 0.0 else f"{value:.1e}"


def compare(name: str, ours: Tensor, theirs: Tensor, atol: float = ATOL) -> Comparison:
    """Compare two tensors of equal shape [..., N]: the largest absolute difference by vector.

    A vector of N may differ by `atol`, or, if its largest absolute value in `theirs` exceeds 1, by
    `atol` times that value, since float32 keeps 24 bits whatever the size. Each vector has its own
    tolerance, because real models make the first position's hidden state a thousand times as large
    as all others, and its tolerance would hide their mistakes. The result is for the vector that
    comes nearest to its tolerance. Tensors of different shapes differ by infinity.
    """
    if ours.shape != theirs.shape:
        return Comparison(name, float("inf"), atol)
    ours, theirs = (tensor.detach().to("cpu", torch.float64) for tensor in (ours, theirs))
    apart = (ours - theirs).abs().amax(-1).flatten()
    limits = atol * theirs.abs().amax(-1).flatten().clamp(min=1.0)
    equal = bool((apart == 0).all())
    worst = int(limits.argmin() if equal else (apart / limits).argmax())  # the first NaN, if any
    return Comparison(name, float(apart[worst]), float(limits[worst]))


def compare_tokens(name: str, ours: Sequence[int], theirs: Sequence[int]) -> Comparison:
    """Count the places at which two sequences of ids differ, including any surplus ids."""
    differ = sum(a != b for a, b in zip(ours, theirs, strict=False))
    return Comparison(name, differ + abs(len(ours) - len(theirs)), 0)
