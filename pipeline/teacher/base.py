"""What training rows come from: tokens shard by shard, with what a teacher says of them.

Three are interchangeable: `teacher/cached.py` reads the store, `teacher/online.py` runs the live
model, and `NoTeacher` has tokens alone. Nothing else in training knows which one it has.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pipeline.data.packing import Rows
from pipeline.data.rows import CorpusSplit
from pipeline.model.attention import Attention
from pipeline.store.reader import Shard
from pipeline.topk import TopK


class Teacher(Protocol):
    """A source of rows and targets."""

    @property
    def corpus(self) -> CorpusSplit:
        """The split whose rows it knows."""
        ...

    @property
    def shard_rows(self) -> int:
        """Rows a shard, the unit of reading and of shuffling."""
        ...

    @property
    def attention(self) -> Attention:
        """How it attends within a row, and so its student."""
        ...

    @property
    def in_background(self) -> bool:
        """Whether `top_k` may run in another thread, beside the student."""
        ...

    def shard(self, number: int) -> Shard:
        """Read one shard; called from several threads."""
        ...

    def top_k(self, places: list[tuple[Shard, int]], tokens: Tensor) -> TopK | None:
        """TopK [B, L, ...] of corpus rows in shards at hand, whose tokens are int64 [B, L]."""
        ...


class NoTeacher:
    """Tokens alone, for plain language modelling."""

    in_background = True

    def __init__(self, corpus: CorpusSplit, *, shard_rows: int, attention: Attention) -> None:
        self.corpus = corpus
        self.shard_rows = shard_rows
        self.attention = attention

    def shard(self, number: int) -> Shard:
        return corpus_shard(self.corpus, number, self.shard_rows)

    def top_k(self, places: list[tuple[Shard, int]], tokens: Tensor) -> None:
        """No targets."""


def rows_at(places: list[tuple[Shard, int]]) -> Rows:
    """Corpus rows that lie in shards at hand, in the order given."""
    return Rows.cat([shard.rows[row - shard.first :][:1] for shard, row in places])


def corpus_shard(corpus: CorpusSplit, number: int, shard_rows: int) -> Shard:
    """The tokens that a cache of so many rows a shard would hold as shard `number`."""
    first = number * shard_rows
    rows = corpus.rows(first, min(first + shard_rows, len(corpus)))
    return Shard(first=first, rows=rows, arrays=None)
