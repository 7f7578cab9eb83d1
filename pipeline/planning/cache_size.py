"""The disk space of a cache: bytes per token for each mode, objects, bytes per second to read.

Bytes per token were measured on the demo's corpus and teacher (SmolLM2-135M on Python's library,
three temperatures) by `stages/advise.py` and tests/benchmarks/targets.py. Ids of more than 16 bits,
which that teacher does not have, were measured by storing its indices as uint32. Another teacher
and another text give other sizes: `stages/advise.py` measures yours on a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config.cache_params import PrepareParams
from pipeline.logit_cache.format import FORMAT_VERSION, Fingerprint
from pipeline.logit_cache.layout import CacheLayout

_KS = (16, 32, 48, 64, 96, 128, 192, 256)
_BYTES = (52.4, 87.2, 120.2, 152.5, 216.5, 280.4, 407.3, 533.3)
_FIXED = _BYTES[0] - _KS[0] * (_BYTES[1] - _BYTES[0]) / (_KS[1] - _KS[0])
"""lse, lse_tau and entropy: the size at K = 0, extrapolated from the first two values of K."""
_A_KEPT_ID_BEYOND = (_BYTES[-1] - _BYTES[-2]) / (_KS[-1] - _KS[-2])
_SAMPLED_BESIDE_TOP_K = (
    130.8 - 86.1
) / 16  # top 32 + 16 sampled ids over top 32: mostly improbable ids
_SAMPLED_ALONE = (72.2 - _FIXED) / 50  # 50 sampled ids, many of which are the same probable ids
_WIDE_ID = 0.09  # the same indices as uint32: 103.7 bytes per token instead of 97.9 at K = 64
CORPUS_BYTES = 1.3  # bytes per token with document ids, of 1.4 M tokens; uint32 takes no more


@dataclass(frozen=True, kw_only=True)
class Mode:
    """The values kept for each position."""

    k: int
    num_sampled: int

    @property
    def name(self) -> str:
        """The name of this mode in a table."""
        parts = [f"top {self.k}"] if self.k else []
        return " + ".join(parts + ([f"{self.num_sampled} sampled ids"] if self.num_sampled else []))


def bytes_a_token(mode: Mode, vocab_size: int) -> float:
    """Return the cache's bytes per token without the corpus, interpolated linearly."""
    size = float(np.interp(mode.k, (0, *_KS), (_FIXED, *_BYTES)))
    size += max(0, mode.k - _KS[-1]) * _A_KEPT_ID_BEYOND
    size += mode.num_sampled * (_SAMPLED_BESIDE_TOP_K if mode.k else _SAMPLED_ALONE)
    return size + (_WIDE_ID * (mode.k + mode.num_sampled) if vocab_size > 65_536 else 0.0)


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """The size of a cache with a given number of positions, for both splits together."""

    mode: Mode
    bytes_a_token: float
    total: float  # bytes
    shard: float  # bytes of all objects of a full shard
    shards: int
    objects: int  # files, or keys of a store


def cache_size(
    mode: Mode, vocab_size: int, split_rows: Sequence[int], row_length: int, prepare: PrepareParams
) -> CacheSize:
    """Compute the size of a cache and its division into shards and objects.

    Args:
        split_rows: rows of each split; each split has its own shards.
        prepare: only chunk_rows, shard_rows and temperatures are read.
    """
    each, rows = bytes_a_token(mode, vocab_size), sum(split_rows)
    shards = sum(math.ceil(count / prepare.shard_rows) for count in split_rows)
    layout = CacheLayout(
        fingerprint=_fingerprint(mode, vocab_size, rows, row_length, prepare.temperatures),
        chunk_rows=prepare.chunk_rows,
        shard_rows=prepare.shard_rows,
        id_order="",
    )
    return CacheSize(
        mode=mode,
        bytes_a_token=each,
        total=each * rows * row_length,
        shard=each * prepare.shard_rows * row_length,
        shards=shards,
        objects=shards * (len(layout.specs) + 1),  # one part per array, and a commit marker
    )


def _fingerprint(
    mode: Mode, vocab_size: int, rows: int, row_length: int, temperatures: tuple[float, ...]
) -> Fingerprint:
    """Return the fingerprint of a cache that does not exist; only its sizes have a meaning."""
    return Fingerprint(
        format_version=FORMAT_VERSION,
        teacher_sha256="",
        tokenizer_sha256="",
        corpus_sha256="",
        dtype="float16",
        engine="",
        document_mask=True,
        k=mode.k,
        num_sampled=mode.num_sampled,
        sampling_seed=0,
        temperatures=temperatures,
        top_p=None,
        entropy_quantile=0.0,
        vocab_size=vocab_size,
        num_rows=rows,
        row_length=row_length,
    )
