"""The disk space of a cache: bytes per token for each mode, objects, bytes per second to read.

Bytes per token were measured on the demo's corpus and teacher (SmolLM2-135M on Python's library, 64
rows of 256 tokens, of whose positions 99.4 % have a target) with the cache's own codec, as
`stages/advise.py` does. Ids of more than 16 bits, which that teacher does not have, were measured
by storing its indices as uint32. Another teacher and another text give other sizes:
`stages/advise.py` measures yours on a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.config.cache_params import PrepareParams
from pipeline.logit_cache.format import FORMAT_VERSION, Fingerprint
from pipeline.logit_cache.layout import CacheLayout

_NO_IDS = 3.5  # lse and the entropy
_A_TEMPERATURE = 2.0  # each other than 1
_KS = (0, 16, 32, 48, 64, 96, 128, 192, 256)
_TOP_K = (_NO_IDS, 43.7, 78.6, 111.6, 144.1, 208.2, 271.8, 397.9, 523.0)

_TOP_PS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
_NUCLEUS = {
    16: (1.0, 3.8, 7.6, 9.4, 10.8, 12.2, 13.0, 16.0),
    64: (1.0, 6.0, 19.3, 28.4, 35.2, 42.3, 46.5, 64.0),
    256: (1.0, 6.7, 39.9, 75.7, 108.7, 143.0, 163.6, 256.0),
}
"""Mean number of the K ids that hold each mass of `_TOP_PS`. A cut to a mean of n ids takes what
the top n takes, to 5 % (0.8 and more), or up to 14 % less."""

_ALONE = (
    {0: 0.0, 10: 8.1, 25: 14.9, 50: 23.9, 100: 37.8, 200: 59.7},
    {0: 0.0, 10: 8.1, 25: 13.4, 50: 21.5, 100: 34.6, 200: 56.0},
)
_BESIDE_TOP_K = (
    {0: 0.0, 8: 13.0, 16: 23.2, 32: 42.3},
    {0: 0.0, 8: 12.2, 16: 21.4, 32: 41.4},
)
"""By M: bytes of the sampled ids and their counts, then of their log-probabilities, which are
stored if a temperature other than 1 is. Of those alone, 4.6, 8.8, 14.5, 24.0 and 39.4 are distinct;
those beside a top K are improbable and mostly distinct."""

_QUANTILES = (0.0, 0.5, 0.8, 1.0)
_OF_TOP_K = (1.0, 0.516, 0.210, 0.0)
_OF_SAMPLED_ALONE = (1.0, 0.784, 0.423, 0.0)
"""Share of the bytes at the positions whose entropy is above a quantile: these have as many ids as
others, but more distinct samples."""

_WIDE_ID = 0.1  # each kept id's index as uint32; sampled ones take no more
CORPUS_BYTES = 1.3  # bytes per token with document ids, of 1.4 M tokens; uint32 takes no more


@dataclass(frozen=True, kw_only=True)
class Mode:
    """What a cache keeps of each position, and of which; the fields are those of a fingerprint."""

    k: int
    num_sampled: int = 0
    top_p: float | None = None
    entropy_quantile: float = 0.0

    @staticmethod
    def of(prepare: PrepareParams) -> Mode:
        """Return the mode of these parameters."""
        return Mode(
            k=prepare.k,
            num_sampled=prepare.num_sampled,
            top_p=prepare.top_p if prepare.k else None,
            entropy_quantile=prepare.stored_quantile,
        )

    @property
    def name(self) -> str:
        """The name of this mode in a table."""
        parts = [f"top {self.k}"] if self.k else []
        parts += [f"{self.num_sampled} sampled ids"] if self.num_sampled else []
        name = " + ".join(parts)
        if self.top_p is not None:
            name += f", top_p={self.top_p:g}"
        if self.entropy_quantile:
            name += f", high_entropy {self.entropy_quantile:g}"
        return name


def bytes_a_token(mode: Mode, vocab_size: int, temperatures: tuple[float, ...] = ()) -> float:
    """Return the cache's bytes per token without the corpus, interpolated linearly.

    Args:
        temperatures: those stored; 1 takes nothing.
    """
    others = [tau for tau in temperatures if tau != 1.0]
    num_ids = _mean_ids(mode)
    size = _extended(num_ids, _KS, _TOP_K) + len(others) * _A_TEMPERATURE
    tables = _BESIDE_TOP_K if mode.k else _ALONE
    for sizes in tables if others else tables[:1]:
        size += _extended(mode.num_sampled, list(sizes), list(sizes.values()))
    size += _WIDE_ID * num_ids if vocab_size > 65_536 else 0.0
    shares = _OF_TOP_K if mode.k else _OF_SAMPLED_ALONE
    return size * float(np.interp(mode.entropy_quantile, _QUANTILES, shares))


def _mean_ids(mode: Mode) -> float:
    """Return the mean number of ids that are kept of the top K."""
    if not mode.k or mode.top_p is None:
        return float(mode.k)
    shares = [np.interp(mode.top_p, _TOP_PS, ids) / k for k, ids in _NUCLEUS.items()]
    share = float(np.interp(math.log(mode.k), [math.log(k) for k in _NUCLEUS], shares))
    return max(1.0, share * mode.k)


def _extended(value: float, values: Sequence[float], sizes: Sequence[float]) -> float:
    """Interpolate linearly; beyond the last value, with the last slope."""
    slope = (sizes[-1] - sizes[-2]) / (values[-1] - values[-2])
    return float(np.interp(value, values, sizes)) + max(0.0, value - values[-1]) * slope


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
    mode: Mode,
    vocab_size: int,
    split_rows: Sequence[int],
    row_length: int,
    prepare: PrepareParams,
    share_in_loss: float = 1.0,
) -> CacheSize:
    """Compute the size of a cache and its division into shards and objects.

    Args:
        split_rows: rows of each split; each split has its own shards.
        prepare: only chunk_rows, shard_rows and temperatures are read.
        share_in_loss: share of the tokens that are in the loss; the others take nothing.
    """
    each = share_in_loss * bytes_a_token(mode, vocab_size, prepare.temperatures)
    rows = sum(split_rows)
    shards = sum(math.ceil(count / prepare.shard_rows) for count in split_rows)
    layout = CacheLayout(
        fingerprint=_fingerprint(mode, vocab_size, rows, row_length, prepare.stored_temperatures),
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
        sampling_seed=0,
        temperatures=temperatures,
        vocab_size=vocab_size,
        num_rows=rows,
        row_length=row_length,
        **asdict(mode),
    )
