"""Rows without targets, for plain language modelling: the baseline."""

from __future__ import annotations

from torch import Tensor

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.row_order import Shard, read_rows
from pipeline.target_sources.target_source import Place


class TokensOnly:
    """A `TargetSource` without targets.

    Args:
        shard_rows: rows per shard, so that rows come in the same order as from a cache.
        document_mask: whether the student attends within documents only.
    """

    in_background = True
    entropy_quantile = None

    def __init__(self, corpus: CorpusSplit, *, shard_rows: int, document_mask: bool) -> None:
        self.corpus = corpus
        self.shard_rows = shard_rows
        self.document_mask = document_mask

    def shard(self, number: int) -> Shard:
        return read_rows(self.corpus, number, self.shard_rows)

    def targets(self, places: list[Place], tokens: Tensor) -> None:
        """Return no targets."""
