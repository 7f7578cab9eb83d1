"""What a check of a sample is said to find, against counting and drawing."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.verify.power import chi2_quantile, reach, spread


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    wanted=st.integers(1, 200),
    seed=st.integers(0, 5),
)
def test_a_row_of_each_shard_comes_first(sizes: list[int], wanted: int, seed: int) -> None:
    rows = spread(sizes, wanted, seed)
    assert rows == sorted(set(rows))
    assert len(rows) == min(wanted, sum(sizes))
    shards = set(np.searchsorted(np.cumsum(sizes), rows, side="right").tolist())
    assert len(shards) >= min(wanted, len(sizes))


def test_one_wrong_shard_of_200_is_said_to_escape_100_rows() -> None:
    """And it does, in half of all sampled ids; 5 wrong ones are found in 97 of 100."""
    found = reach(shards=200, rows=100, positions=25_600, allowed=2)
    assert (found.shards_seen, found.wrong_shards) == (100, 5)
    assert found.rows_for["one shard"] == 190
    assert found.rows_for["one shard in 100"] == 155  # 45 x 44 / (200 x 199) = 0.0497
    for wrong, share in ((1, 0.5), (5, 0.97)):
        generator = np.random.default_rng(0)
        hits = 0
        for seed in range(1000):
            bad = generator.choice(200, wrong, replace=False) * 8
            rows = np.array(spread([8] * 200, 100, seed))
            hits += bool(np.isin(rows // 8 * 8, bad).any())
        assert hits / 1000 == pytest.approx(share, abs=0.05)


def test_many_shards_need_299_rows_for_one_in_100() -> None:
    found = reach(shards=1_000_000, rows=100, positions=25_600, allowed=2)
    assert found.rows_for["one shard in 100"] == 299  # log 0.05 / log 0.99
    assert found.wrong_shards / 1_000_000 == pytest.approx(0.0295, abs=1e-4)
    escapes = comb(1_000_000 - found.wrong_shards, 100) / comb(1_000_000, 100)
    assert escapes == pytest.approx(0.05, abs=1e-4)


def test_wrong_positions_that_are_found() -> None:
    found = reach(shards=4, rows=100, positions=25_600, allowed=2)
    assert found.wrong_shards == 1
    drawn = np.random.default_rng(0).binomial(25_600, found.wrong_positions, 20_000)
    assert (drawn > 2).mean() == pytest.approx(0.95, abs=0.01)
    assert found.rows_for["one position in 1,000"] == 12  # 2,996 positions


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.4
    [(0.95, 1, 3.841), (0.95, 10, 18.307), (0.05, 10, 3.940), (0.999, 100, 149.449)],
)
def test_quantiles_of_chi_square(probability: float, degrees: float, quantile: float) -> None:
    assert chi2_quantile(probability, degrees) == pytest.approx(quantile, abs=1e-3)
