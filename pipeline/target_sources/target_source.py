"""The source of training rows: tokens shard by shard, with the teacher's predictions for them.

There are three interchangeable sources: `teacher/cached.py` reads the store, `teacher/online.py`
runs the live model, and `NoTeacher` has only tokens. No other part of training knows which one it
has.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import Rows
from pipeline.logit_cache.reader import Shard
from pipeline.model.attention_mask import Attention
from pipeline.targets.topk import TopK


class Teacher(Protocol):
    """A source of rows and targets."""

    @property
    def corpus(self) -> CorpusSplit:
        """The split that the rows come from."""
        ...

    @property
    def shard_rows(self) -> int:
        """Number of rows per shard, the unit of reading and of shuffling."""
        ...

    @property
    def attention(self) -> Attention:
        """How the teacher, and therefore its student, attends within a row."""
        ...

    @property
    def in_background(self) -> bool:
        """Whether `top_k` may run in another thread while the student runs."""
        ...

    def shard(self, number: int) -> Shard:
        """Read one shard; called from several threads."""
        ...

    def top_k(self, places: list[tuple[Shard, int]], tokens: Tensor) -> TopK | None:
        """Return TopK [B, L, ...] of rows in shards already read; tokens are int64 [B, L]."""
        ...


class NoTeacher:
    """Tokens without targets, for plain language modelling."""

    in_background = True

    def __init__(self, corpus: CorpusSplit, *, shard_rows: int, attention: Attention) -> None:
        self.corpus = corpus
        self.shard_rows = shard_rows
        self.attention = attention

    def shard(self, number: int) -> Shard:
        return corpus_shard(self.corpus, number, self.shard_rows)

    def top_k(self, places: list[tuple[Shard, int]], tokens: Tensor) -> None:
        """Return no targets."""


def rows_at(places: list[tuple[Shard, int]]) -> Rows:
    """Return corpus rows from shards already read, in the given order."""
    return Rows.cat([shard.rows[row - shard.first :][:1] for shard, row in places])


def corpus_shard(corpus: CorpusSplit, number: int, shard_rows: int) -> Shard:
    """Return the tokens that a cache with `shard_rows` rows per shard would hold as that shard."""
    first = number * shard_rows
    rows = corpus.rows(first, min(first + shard_rows, len(corpus)))
    return Shard(first=first, rows=rows, arrays=None)
