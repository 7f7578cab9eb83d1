"""The power of a check on a sample: which rows it examines, and the smallest fault it detects.

A check that passes says little unless the size of the fault that it would have detected is known.
All statements here hold at POWER: of the caches with that fault or a larger one, at least 95 in 100
fail.
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
    """The amount of a cache that must be wrong to be detected."""

    shards: int
    shards_seen: int
    wrong_shards: int  # the smallest number that is detected, wherever they are
    wrong_positions: float  # the smallest share that is detected, wherever they are
    rows_for: dict[str, int]  # the number of rows that detects each smaller fault


def reach(*, shards: int, rows: int, positions: int, allowed: int) -> Reach:
    """Compute the reach of a check.

    Args:
        rows: number of rows examined, chosen by `spread`; they cover min(shards, rows) shards.
        positions: number of positions in these rows.
        allowed: number of positions that may be wrong without failing the check.
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
    """Choose rows to examine, in ascending order: first one per shard, then any other rows.

    Both are sampled one from each of equal strata, so they are spread evenly over the cache.

    Args:
        sizes: number of rows in each shard, in order.
        wanted: number of rows to draw; if there are fewer, all are taken.
    """
    generator = np.random.default_rng(seed)
    ends = np.cumsum(sizes)
    shards = _one_of_each(len(sizes), min(wanted, len(sizes)), generator)
    first = [int(generator.integers(ends[s] - sizes[s], ends[s])) for s in shards]
    others = np.delete(np.arange(ends[-1]), first)
    more = _one_of_each(len(others), min(wanted - len(first), len(others)), generator)
    return sorted([*first, *others[more].tolist()])


def chi2_quantile(probability: float, degrees: float) -> float:
    """Return the value below which a chi-square variable lies with `probability`.

    P(X <= x) is the regularised lower incomplete gamma function P(degrees / 2, x / 2); `degrees`
    may be any number above 0.
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
    """Return the probability that no wrong shard is among those seen: C(S - w, b) / C(S, b).

    S is `shards`, w is `wrong` and b is `seen`. This is hypergeometric (Feller 1968, "An
    Introduction to Probability Theory and Its Applications", section II.6): 1 - b / S for a single
    wrong shard, and nearly (1 - w / S)^b for large S.
    """
    if wrong + seen > shards:
        return 0.0
    terms = (shards - wrong, shards - seen, shards, shards - wrong - seen)
    a, b, c, d = (lgamma(term + 1) for term in terms)
    return exp(a + b - c - d)


def _rows_for(shards: int, wrong: int) -> int:
    return _smallest(shards, lambda seen: _all_missed(shards, wrong, seen))


def _smallest(most: int, missed: Callable[[int], float]) -> int:
    """Return the first of 1..most at which a falling probability is 1 - POWER or less.

    The comparison allows for rounding.
    """
    return 1 + bisect_left(range(1, most), True, key=lambda n: missed(n) <= 1.0 - POWER + 1e-9)


def _poisson_mean(allowed: int) -> float:
    """Return the mean at which a Poisson variable exceeds `allowed` with probability POWER.

    It is half a quantile of chi-square with 2 (allowed + 1) degrees of freedom (Garwood 1936,
    "Fiducial Limits for the Poisson Distribution"), and 3.0 for allowed = 0.
    """
    return chi2_quantile(POWER, 2.0 * (allowed + 1)) / 2


def _one_of_each(size: int, strata: int, generator: np.random.Generator) -> list[int]:
    """Draw an index below `size` from each of equal strata."""
    edges = np.arange(strata + 1) * size // max(1, strata)
    return [int(generator.integers(a, b)) for a, b in pairwise(edges)]
