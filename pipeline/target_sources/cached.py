"""The cached teacher: targets come from the store, so the teacher itself is not needed."""

from __future__ import annotations

from torch import Tensor

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.logit_cache.reader import CacheReader, Shard
from pipeline.model.attention_mask import Attention
from pipeline.targets.topk import TopK


class CachedTeacher:
    """A `pipeline.target_sources.target_source.Teacher` that reads from a CacheReader."""

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
    def attention(self) -> Attention:
        return self.reader.fingerprint.attention

    def shard(self, number: int) -> Shard:
        return self.reader.shard(number)

    def top_k(self, places: list[tuple[Shard, int]], tokens: Tensor) -> TopK:
        """Return stored targets; reading the shard has checked that they belong to its tokens."""
        return self.reader.gather(places)
