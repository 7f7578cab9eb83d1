"""Intervals against a plain loop, against tables, and against a truth that is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.runtime import bootstrap
from pipeline.runtime.bootstrap import intervals, outside_share

DOCUMENT_SHARE = 0.7  # of the standard deviation that a document's positions have in common


def draw_text(seed: int, documents: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Values whose mean is 3, of documents of 5 to 60 positions, and the document of each."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(5, 60, documents)
    clusters = np.repeat(generator.permutation(10 * documents)[:documents], sizes)
    common = np.repeat(generator.normal(size=documents), sizes)
    noise = generator.normal(size=len(clusters))
    values = 3 + DOCUMENT_SHARE * common + (1 - DOCUMENT_SHARE) * noise
    return values.astype(np.float32), clusters


def test_a_plain_loop_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = draw_text(0, documents=12)
    fast = intervals({"a": values, "b": values**2}, clusters)
    documents = [np.flatnonzero(clusters == number) for number in np.unique(clusters)]
    generator = np.random.default_rng(bootstrap._SEED)
    means = []
    for _ in range(bootstrap._REPLICATES):
        drawn = [documents[i] for i in generator.integers(12, size=12)]
        positions = np.concatenate(drawn)
        means.append((values[positions].mean(dtype=np.float64), (values[positions] ** 2).mean()))
    share = outside_share(12)
    for place, name in enumerate("ab"):
        low, high = np.quantile(np.array(means)[:, place], [share, 1 - share])
        assert fast[name].low == pytest.approx(low, rel=1e-6)
        assert fast[name].high == pytest.approx(high, rel=1e-6)
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", 50)
    assert intervals({"a": values, "b": values**2}, clusters) == fast


@pytest.mark.parametrize(
    ("documents", "quantile"),
    [(5, 2.7764), (10, 2.2622), (15, 2.1448), (30, 2.0452), (1001, 1.9623)],
)
def test_students_t_is_that_of_the_tables(documents: int, quantile: float) -> None:
    t = bootstrap._t_quantile(1.959964, documents - 1)
    assert t == pytest.approx(quantile, rel=2e-3 if documents < 10 else 1e-4)


def coverage(documents: int, *, plain: bool = False, by_position: bool = False) -> float:
    """Share of texts whose interval holds the true mean."""
    held = 0
    for seed in range(400):
        values, clusters = draw_text(seed, documents)
        if by_position:
            clusters = np.arange(len(values))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bootstrap, "_REPLICATES", 400)
            if plain:
                patch.setattr(bootstrap, "outside_share", lambda n: 0.025)
            found = intervals({"mean": values}, clusters)["mean"]
        held += found.low <= 3 <= found.high
    return held / 400


def test_95_of_100_intervals_hold_the_truth() -> None:
    assert coverage(40) == pytest.approx(0.95, abs=0.025)
    assert coverage(15) == pytest.approx(0.95, abs=0.025)
    assert coverage(15, plain=True) < 0.925
    assert coverage(15, by_position=True) < 0.5  # positions of a document are not independent


def test_what_is_hard_for_both_cancels_in_a_difference() -> None:
    one, clusters = draw_text(1, documents=30)
    other = one + np.random.default_rng(2).normal(0.1, 0.2, len(one)).astype(np.float32)
    apart = intervals({"one": one, "other": other}, clusters)
    paired = intervals({"difference": other - one}, clusters)["difference"]
    assert paired.low < 0.1 < paired.high
    assert paired.half_width < 0.1 * apart["one"].half_width
    assert apart["other"].low < apart["one"].high  # side by side, they seem to be equal


def test_one_document_alone_has_no_interval() -> None:
    assert intervals({"a": np.ones(5, np.float32)}, np.zeros(5, np.int64)) == {}


def test_what_never_varies_has_an_interval_of_no_width() -> None:
    values, clusters = draw_text(3, documents=9)
    found = intervals({"constant": np.full_like(values, 0.5)}, clusters)["constant"]
    assert (found.low, found.high) == (0.5, 0.5)
