"""Read a cache: committed rows as TopK, and the shuffled order in which training visits rows.

Opening checks the fingerprint against the corpus, that every shard is committed, and that each
shard's files have the sizes their marker states. The first time rows of a shard are read, the
corpus rows they belong to are hashed and compared with the marker: a cache never pairs with other
tokens in silence. Decoding checks crc32c on every chunk.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.data.rows import CorpusSplit, hash_rows
from pipeline.errors import MismatchError
from pipeline.store.codec import Arrays, decode
from pipeline.store.schema import ARRAYS, Fingerprint, num_shards
from pipeline.store.writer import marker_path, read_attributes, shard_path
from pipeline.topk import TopK

_REPAIR = "run stages/prepare.py to capture what is missing"


class CacheReader:
    """The complete cache of one split, bound to the corpus split it was made from.

    Args:
        path: the cache, for example cache/logits.zarr; the split's group lies in it.
        corpus: the split whose rows the cache describes.
        k: use only the first k stored ids; None uses all.
        keep_chunks: chunks held in memory, the least recently used dropped first.

    Raises:
        MismatchError: absent, incomplete, damaged, or made from another corpus.
    """

    def __init__(
        self, path: Path, corpus: CorpusSplit, *, k: int | None = None, keep_chunks: int = 2
    ) -> None:
        self.path = path / corpus.split
        if not self.path.exists():
            raise MismatchError(
                f"{self.path} does not exist: run stages/prepare.py (or `dvc repro`)"
            )
        attributes = read_attributes(self.path)
        self.fingerprint = Fingerprint.from_json(attributes, str(self.path))
        self.chunk_rows: int = attributes["chunk_rows"]
        self._shard_rows: int = attributes["shard_rows"]
        self._corpus = corpus
        self._require_corpus()
        self._markers = [self._marker(shard) for shard in range(self._num_shards())]
        self._checked: set[int] = set()
        group = zarr.open_group(self.path, mode="r")
        self._arrays: dict[str, Any] = {name: group[name] for name in ARRAYS}
        self._k = k
        self._keep_chunks = keep_chunks
        self._chunks: OrderedDict[int, Arrays] = OrderedDict()
        if k is not None and k > self.fingerprint.k:
            raise MismatchError(
                f"k={k} ids are wanted, {self.path} stores {self.fingerprint.k}: lower train.k, or "
                "capture with a larger prepare.k"
            )

    def num_bytes(self) -> int:
        """Bytes of all committed shards."""
        return sum(sum(marker["sizes"].values()) for marker in self._markers)

    def top_k(self, rows: NDArray[np.int64]) -> TopK:
        """TopK [n, L, K] of any rows; neighbouring rows share the work of reading a chunk.

        Chunks are kept as stored, a quarter of their decoded size, and all work is NumPy's: this
        runs beside training, and torch's worker threads would fight with those of the student.
        """
        chunks = [self._chunk(int(row) // self.chunk_rows) for row in rows]
        offsets = [int(row) % self.chunk_rows for row in rows]
        return decode(
            {
                name: np.stack([c[name][i] for c, i in zip(chunks, offsets, strict=True)])
                for name in ARRAYS
            },
            self.fingerprint,
        )

    def _chunk(self, chunk: int) -> Arrays:
        if chunk in self._chunks:
            self._chunks.move_to_end(chunk)
            return self._chunks[chunk]
        start = chunk * self.chunk_rows
        stop = min(start + self.chunk_rows, self.fingerprint.num_rows)
        self._check_tokens(start // self._shard_rows)
        try:
            arrays: Arrays = {name: array[start:stop] for name, array in self._arrays.items()}
        except Exception as error:  # zarr, numcodecs and the OS each have their own
            raise MismatchError(
                f"rows {start}..{stop} of {self.path} are damaged "
                f"({' '.join(str(error).split())[:200]}): remove {self._marker_of(start)} and "
                "run stages/prepare.py"
            ) from error
        for name in ("ids", "logprobs"):  # a prefix of K: steps add up from the first
            arrays[name] = arrays[name][..., : self._k]
        self._chunks[chunk] = arrays
        while len(self._chunks) > self._keep_chunks:
            self._chunks.popitem(last=False)
        return arrays

    def _num_shards(self) -> int:
        return num_shards(self.fingerprint.num_rows, self._shard_rows)

    def _marker_of(self, row: int) -> Path:
        return marker_path(self.path, row // self._shard_rows)

    def _require_corpus(self) -> None:
        info = self._corpus.info
        wanted = {
            "corpus_sha256": info.sha256,
            "tokenizer_sha256": info.tokenizer_sha256,
            "num_rows": info.num_rows,
            "row_length": info.row_length,
        }
        for name, value in wanted.items():
            stored = getattr(self.fingerprint, name)
            if stored != value:
                raise MismatchError(
                    f"{self.path} was captured with {name}={stored}, {self._corpus.path} has "
                    f"{value}: they do not belong together, capture again with "
                    "stages/prepare.py --overwrite"
                )

    def _marker(self, shard: int) -> dict[str, Any]:
        file = marker_path(self.path, shard)
        try:
            marker: dict[str, Any] = json.loads(file.read_text())
            sizes: dict[str, int] = marker["sizes"]
        except (OSError, ValueError, KeyError):
            raise MismatchError(
                f"shard {shard} of {self._num_shards()} in {self.path} is not captured: {_REPAIR}"
            ) from None
        for name, size in sizes.items():
            data = shard_path(self.path, name, shard, 2 if name in ("lse", "entropy") else 3)
            actual = data.stat().st_size if data.exists() else -1
            if actual != size:
                raise MismatchError(
                    f"{data} has {max(actual, 0)} bytes, its marker says {size}: remove {file} and "
                    "run stages/prepare.py"
                )
        return marker

    def _check_tokens(self, shard: int) -> None:
        if shard in self._checked:
            return
        start, stop = self._markers[shard]["rows"]
        if hash_rows(self._corpus.rows(start, stop)).hex() != self._markers[shard]["tokens_sha256"]:
            raise MismatchError(
                f"shard {shard} of {self.path} was captured from other tokens than rows "
                f"{start}..{stop} of {self._corpus.path} hold now: remove {self._marker_of(start)} "
                "and run stages/prepare.py"
            )
        self._checked.add(shard)


def epoch_order(
    num_rows: int, *, chunk_rows: int, window_chunks: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """The order in which an epoch visits rows: every row once, a function of (seed, epoch) alone.

    Chunks are shuffled, then the rows of each window of `window_chunks` chunks are mixed, so a
    reader needs just that window decoded and each chunk is decoded once an epoch.

    Returns:
        int64 [num_rows], a permutation of 0..num_rows-1.
    """
    generator = np.random.default_rng([seed, epoch])
    starts = np.arange(0, num_rows, chunk_rows)
    generator.shuffle(starts)
    order = []
    for first in range(0, len(starts), window_chunks):
        window = np.concatenate(
            [
                np.arange(start, min(start + chunk_rows, num_rows))
                for start in starts[first : first + window_chunks]
            ]
        )
        generator.shuffle(window)
        order.append(window)
    return np.concatenate(order)
