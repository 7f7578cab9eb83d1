"""What a part of the study hands to the report: a title, prose, tables, pictures, comparisons.

A `Comparison` is the unit of the study: one number of ours against Hugging Face's, with the
tolerance it has to meet. Everything beside it explains what was compared.
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
    """Ours against Hugging Face's: passed when `difference <= tolerance`, and finite.

    Attributes:
        difference: largest absolute difference, or a count of things that differ.
        tolerance: 0 where the two must be equal.
    """

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.difference) and self.difference <= self.tolerance


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; `folded` tables are long and start closed in HTML."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """Panels side by side, each drawn into the matplotlib axes it is given."""

    name: str  # of its file
    caption: str
    panels: Sequence[Callable[[Any], None]]
    inches: tuple[float, float] | None = None  # of one panel; None: the usual size


@dataclass
class Section:
    """One part of the study."""

    name: str  # as `--part` names it
    title: str
    prose: list[str] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)  # title and preformatted text
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)  # to be written beside the report


def shown(value: float) -> str:
    """A difference or tolerance in a table: 0 where there is none at all."""
    return "0" if value == 0.0 else f"{value:.1e}"


def compare(name: str, ours: Tensor, theirs: Tensor, atol: float = ATOL) -> Comparison:
    """Two tensors of equal shape [..., N]: the largest absolute difference, vector by vector.

    A vector of N may differ by `atol`, or by `atol` times the largest absolute value that it has in
    `theirs` where that exceeds 1, since float32 keeps 24 bits whatever the size. Each has its own
    tolerance, because real models make the first position's hidden state a thousand times as large
    as all others, whose mistakes its tolerance would cover. The comparison is that of the vector
    that comes nearest to its tolerance. Other shapes differ by infinity.
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
    """Two sequences of ids: how many places differ; what one has more than the other counts."""
    differ = sum(a != b for a, b in zip(ours, theirs, strict=False))
    return Comparison(name, differ + abs(len(ours) - len(theirs)), 0)
