"""Confidence intervals of means over positions, by resampling whole documents with replacement.

Positions of one document are correlated, so treating them as independent would give intervals that
are far too narrow. Therefore whole documents are drawn, as Koehn 2004 ("Statistical Significance
Tests for Machine Translation Evaluation", section 3) draws sentences. A mean over positions is then
a ratio of sums over documents, and only the sums per document are needed.

Limits are percentiles of the replicates (Efron & Tibshirani 1993, "An Introduction to the
Bootstrap", section 13.3), moved outwards as Student's t with n - 1 degrees of freedom and the
factor sqrt(n / (n - 1)) require for n documents (Hesterberg 2015, "What Teachers Should Know about
the Bootstrap": the expanded percentile interval). Plain percentiles are too narrow for few
documents: in tests/runtime/test_bootstrap.py, they contain the true value in 90 % of cases for
15 documents and in 94 % for 40, and the expanded ones in 93 % and 95.5 %. If positions are treated
as independent, it is 22 %.

The difference between two models has its own interval, from differences position by position: both
models see the same documents in every replicate, so what makes a text hard for both cancels out.

Shapes: n clusters (documents), m quantities, r replicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_LEVEL = 0.95
_REPLICATES = 2000
_SEED = 0
_DRAWS_AT_ONCE = 4_000_000  # 32 MB each for the drawn numbers and for the counts


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the distance between the limits."""
        return (self.high - self.low) / 2


def clusters_of(
    documents: Sequence[NDArray[np.integer]], rows: Sequence[NDArray[np.integer]]
) -> tuple[NDArray[np.int64], str]:
    """Return the cluster of each position, and what they are, for example "96 documents".

    A single document cannot be resampled; then its rows are.

    Args:
        documents: [some positions] each, the document of a position.
        rows: the same positions, the row of each.
    """
    clusters = np.concatenate(documents).astype(np.int64)
    if len(np.unique(clusters)) > 1:
        return clusters, f"{len(np.unique(clusters)):,} documents"
    clusters = np.concatenate(rows).astype(np.int64)
    return clusters, f"{len(np.unique(clusters)):,} rows"


def intervals(
    values: Mapping[str, NDArray[np.float32]], clusters: NDArray[np.int64]
) -> dict[str, Interval]:
    """Return intervals of the means of several quantities, from the same replicates.

    Args:
        values: [positions] for each quantity.
        clusters: [positions], the number of the document that a position belongs to.

    Returns:
        An interval for each quantity; an empty dict if there are fewer than two clusters.
    """
    _, index, counts = np.unique(clusters, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return {}
    sums = np.stack([np.bincount(index, weights=value) for value in values.values()])  # [m, n]
    means = np.concatenate(
        [
            weights @ sums.T / (weights @ counts)[:, None]
            for weights in _replicates(len(counts), _REPLICATES)
        ]
    )
    outside = outside_share(len(counts))
    lows, highs = np.quantile(means, [outside, 1.0 - outside], axis=0)
    return {
        name: Interval(float(low), float(high))
        for name, low, high in zip(values, lows, highs, strict=True)
    }


def _replicates(n: int, r: int) -> Iterator[NDArray[np.float64]]:
    """Yield how often each cluster is drawn in n draws, [some, n] at a time, r rows in total."""
    generator = np.random.default_rng(_SEED)
    at_once = max(1, _DRAWS_AT_ONCE // n)
    for first in range(0, r, at_once):
        rows = min(at_once, r - first)
        drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def outside_share(n: int) -> float:
    """Return the share of replicates beyond each limit of the expanded interval of n clusters.

    This is Phi(-sqrt(n / (n - 1)) t), where t is the quantile of Student's t with n - 1 degrees of
    freedom; for plain percentiles it would be 0.025.
    """
    normal = NormalDist()
    t = _t_quantile(normal.inv_cdf((1.0 + _LEVEL) / 2), n - 1)
    return normal.cdf(-sqrt(n / (n - 1)) * t)


def _t_quantile(z: float, degrees: int) -> float:
    """Return Student's t quantile from the normal one (Abramowitz & Stegun 1964, eq. 26.7.5)."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum((term / degrees**power for power, term in enumerate(terms, 1)), 0.0)
