"""The order in which training visits the rows of a corpus, and the shards in which it reads them.

Runs with a cache, with a live teacher and without any visit the same rows in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import Rows


@dataclass(frozen=True)
class Shard:
    """Consecutive corpus rows in memory, `first` on: the unit of reading and of shuffling."""

    first: int
    rows: Rows


def read_rows(corpus: CorpusSplit, number: int, shard_rows: int) -> Shard:
    """Return the rows that a cache with `shard_rows` rows per shard holds as shard `number`."""
    first = number * shard_rows
    return Shard(first=first, rows=corpus.rows(first, min(first + shard_rows, len(corpus))))


class ShuffledRows:
    """The endless order in which training visits rows, a function of (seed, place) alone.

    Every row occurs once per epoch. Shards are shuffled, then the rows of each window of
    `window_shards` shards are shuffled, so a reader needs only that window in memory and reads each
    shard once per epoch. Any place can be computed directly, since the random numbers for a window
    depend only on (seed, epoch, window).
    """

    def __init__(self, num_rows: int, *, shard_rows: int, window_shards: int, seed: int) -> None:
        self._num_rows = num_rows
        self._shard_rows = shard_rows
        self._window_shards = window_shards
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def at(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the rows at places first..first+count, int64 [count]; places run across epochs."""
        parts = []
        while count:
            epoch, place = divmod(first, self._num_rows)
            _, ends = self._epoch(epoch)
            window = int(np.searchsorted(ends, place, side="right"))
            rows = self._window(epoch, window)
            begin = place - (int(ends[window]) - len(rows))
            part = rows[begin : begin + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts)

    def _make_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards in the epoch's order, and the place at which each window ends."""
        shards = np.arange(-(-self._num_rows // self._shard_rows))
        np.random.default_rng([self._seed, epoch]).shuffle(shards)
        first = shards * self._shard_rows
        sizes = np.minimum(first + self._shard_rows, self._num_rows) - first
        ends = np.cumsum(np.add.reduceat(sizes, np.arange(0, len(shards), self._window_shards)))
        return shards, ends

    def _make_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        shards, _ = self._epoch(epoch)
        start = window * self._window_shards
        rows = np.concatenate(
            [
                np.arange(
                    shard * self._shard_rows, min((shard + 1) * self._shard_rows, self._num_rows)
                )
                for shard in shards[start : start + self._window_shards]
            ]
        )
        np.random.default_rng([self._seed, epoch, window]).shuffle(rows)
        return rows
