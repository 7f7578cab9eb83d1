"""Targets from the logit cache, so that the teacher itself is not needed."""

from __future__ import annotations

from torch import Tensor

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.logit_cache.reader import CacheReader, CacheShard
from pipeline.target_sources.target_source import Place
from pipeline.targets.topk import TopK


class CachedTargets:
    """A `TargetSource` that reads from a CacheReader."""

    in_background = True

    def __init__(self, reader: CacheReader) -> None:
        self.reader = reader

    @property
    def corpus(self) -> CorpusSplit:
        return self.reader.corpus

    @property
    def shard_rows(self) -> int:
        return self.reader.layout.shard_rows

    @property
    def document_mask(self) -> bool:
        return self.reader.fingerprint.document_mask

    @property
    def entropy_quantile(self) -> float:
        return self.reader.fingerprint.entropy_quantile

    def shard(self, number: int) -> CacheShard:
        return self.reader.shard(number)

    def targets(self, places: list[Place], tokens: Tensor) -> TopK:
        """Return stored targets; reading the shard has checked that they belong to its tokens."""
        stored = [(shard, row) for shard, row in places if isinstance(shard, CacheShard)]
        assert len(stored) == len(places)
        return self.reader.gather(stored)
