"""The order of rows: every row once per epoch, from any place, in windows of shards."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.row_order import ShuffledRows


@given(
    rows=st.integers(1, 300),
    shard=st.integers(1, 40),
    window=st.integers(1, 8),
    seed=st.integers(0, 99),
    pieces=st.lists(st.integers(1, 50), min_size=1, max_size=5),
)
def test_each_row_once_an_epoch_from_any_place(
    rows: int, shard: int, window: int, seed: int, pieces: list[int]
) -> None:
    def order() -> ShuffledRows:
        return ShuffledRows(rows, shard_rows=shard, window_shards=window, seed=seed)

    whole = order().at(0, 3 * rows)
    for epoch in range(3):
        assert sorted(whole[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))
    if rows > 50:
        assert not np.array_equal(whole[:rows], whole[rows : 2 * rows])
    place = 0
    for piece in pieces:  # any cutting, from a fresh start, gives the same order
        assert np.array_equal(order().at(place, piece), order().at(0, place + piece)[place:])
        place += piece
    one = order().at(rows // 2, 2 * rows)
    assert np.array_equal(one, whole[rows // 2 : rows // 2 + 2 * rows])


def test_a_window_needs_only_its_shards() -> None:
    order = ShuffledRows(160, shard_rows=8, window_shards=4, seed=1).at(0, 160)
    for first in range(0, 160, 32):
        window = order[first : first + 32]
        assert len({int(row) // 8 for row in window}) == 4
        assert sorted(window.tolist()) != window.tolist()
