"""What a check of a sample can find: which rows it looks at, and the smallest fault it would see.

A check that passes says little without the size of the fault that it would have failed on. All that
is said here holds at POWER: of caches with that fault or a larger one, 95 in 100 or more fail.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, exp, lgamma

import numpy as np
import torch

POWER = 0.95


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How much of a cache must be wrong to be found."""

    shards: int
    shards_seen: int
    wrong_shards: int  # the smallest number that is found, wherever they lie
    wrong_positions: float  # the smallest share that is found, wherever they lie
    rows_for: dict[str, int]  # how many find smaller shares


def reach(*, shards: int, rows: int, positions: int, allowed: int) -> Reach:
    """The reach of a check.

    Args:
        rows: that are looked at, chosen by `spread`, and so at most one shard each.
        positions: in these rows.
        allowed: positions that may be wrong without failing the check.
    """
    seen = min(shards, rows)
    return Reach(
        shards=shards,
        shards_seen=seen,
        wrong_shards=_smallest(shards, lambda wrong: _all_missed(shards, wrong, seen)),
        wrong_positions=min(1.0, _poisson_mean(allowed) / positions),
        rows_for={
            "one position in 1,000": ceil(_poisson_mean(0) / 0.001 * rows / positions),
            "one shard in 100": _rows_for(shards, ceil(shards / 100)),
            "one shard": _rows_for(shards, 1),
        },
    )


def spread(sizes: Sequence[int], wanted: int, seed: int) -> list[int]:
    """Rows to look at, rising: one in each shard as far as they go, the rest among all other rows.

    Both are drawn one from each of equal strata, so they lie evenly over the cache.

    Args:
        sizes: rows of each shard, in their order.
        wanted: rows to draw; all rows where there are fewer.
    """
    generator = np.random.default_rng(seed)
    ends = np.cumsum(sizes)
    shards = _one_of_each(len(sizes), min(wanted, len(sizes)), generator)
    first = [int(generator.integers(ends[s] - sizes[s], ends[s])) for s in shards]
    others = np.delete(np.arange(ends[-1]), first)
    more = _one_of_each(len(others), min(wanted - len(first), len(others)), generator)
    return sorted([*first, *others[more].tolist()])


def chi2_quantile(probability: float, degrees: float) -> float:
    """Below this a chi-square variable lies with `probability`; any number of `degrees` above 0.

    P(X <= x) is the regularised lower incomplete gamma function P(degrees / 2, x / 2).
    """
    half = torch.tensor(degrees / 2, dtype=torch.float64)

    def below(x: float) -> bool:
        at = torch.tensor(x / 2, dtype=torch.float64)
        if probability < 0.5:
            return float(torch.special.gammainc(half, at)) < probability
        return float(torch.special.gammaincc(half, at)) > 1.0 - probability

    high = 1.0
    while below(high):
        high *= 2.0
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return high


def _all_missed(shards: int, wrong: int, seen: int) -> float:
    """The probability that none of `wrong` shards is among those seen: C(S - w, b) / C(S, b).

    Hypergeometric (Feller 1968, "An Introduction to Probability Theory and Its Applications",
    section II.6): 1 - b / S for a single one, and nearly (1 - w / S)^b where S is large.
    """
    if wrong + seen > shards:
        return 0.0
    terms = (shards - wrong, shards - seen, shards, shards - wrong - seen)
    a, b, c, d = (lgamma(term + 1) for term in terms)
    return exp(a + b - c - d)


def _rows_for(shards: int, wrong: int) -> int:
    return _smallest(shards, lambda seen: _all_missed(shards, wrong, seen))


def _smallest(most: int, missed: Callable[[int], float]) -> int:
    """The first of 1..most at which a falling probability is 1 - POWER or less, up to rounding."""
    return 1 + bisect_left(range(1, most), True, key=lambda n: missed(n) <= 1.0 - POWER + 1e-9)


def _poisson_mean(allowed: int) -> float:
    """The mean of a Poisson variable that exceeds `allowed` at POWER; 3.0 for 0.

    Half a quantile of chi-square with 2 (allowed + 1) degrees of freedom (Garwood 1936, "Fiducial
    Limits for the Poisson Distribution").
    """
    return chi2_quantile(POWER, 2.0 * (allowed + 1)) / 2


def _one_of_each(size: int, strata: int, generator: np.random.Generator) -> list[int]:
    """An index below `size` from each of equal strata."""
    edges = np.arange(strata + 1) * size // max(1, strata)
    return [int(generator.integers(a, b)) for a, b in pairwise(edges)]
