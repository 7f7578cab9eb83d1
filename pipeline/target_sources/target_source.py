"""The sources of training rows and of their targets.

There are three interchangeable sources: `cached.py` reads targets from the logit cache, `online.py`
computes them with the live teacher, and `tokens_only.py` has none. No other part of training knows
which one it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import Rows
from pipeline.data.row_order import Shard
from pipeline.targets.topk import TopK

Place = tuple[Shard, int]
"""A row that has been read: its shard, and its number in the corpus."""


class TargetSource(Protocol):
    """A source of rows and of targets for them."""

    @property
    def corpus(self) -> CorpusSplit:
        """The split that the rows come from."""
        ...

    @property
    def shard_rows(self) -> int:
        """Number of rows per shard, the unit of reading and of shuffling."""
        ...

    @property
    def document_mask(self) -> bool:
        """Whether the teacher, and therefore its student, attends within documents only."""
        ...

    @property
    def entropy_quantile(self) -> float | None:
        """Of each row's positions in the loss, those with entropy above it have a target.

        0: all have one; None: none has.
        """
        ...

    @property
    def in_background(self) -> bool:
        """Whether `targets` may run in another thread while the student runs."""
        ...

    def shard(self, number: int) -> Shard:
        """Read one shard; called from several threads."""
        ...

    def targets(self, places: list[Place], tokens: Tensor) -> TopK | None:
        """Return the TopK [B, L, ...] of rows that have been read; tokens are int64 [B, L]."""
        ...


def rows_at(places: Sequence[Place]) -> Rows:
    """Return corpus rows from shards already read, in the given order."""
    return Rows.cat([shard.rows[row - shard.first :][:1] for shard, row in places])
