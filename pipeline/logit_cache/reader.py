"""Read a cache: whole shards, checked and decoded.

Opening a cache checks its fingerprint against the corpus, and that every shard is committed.
Reading a shard checks each object against its size and hash in the marker, every chunk against its
own crc32c, and the corpus rows against the marker's sha256, so a cache is never silently paired
with other tokens. Objects are read whole, so an object store gets one request per object, and
training reads each object of the cache once per epoch. A corpus shard holds the tokens of several
cache shards, and is read again if it is no longer among the last two.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.corpus_zarr import CorpusSplit, hash_rows
from pipeline.data.packing import Rows
from pipeline.data.row_order import Shard
from pipeline.errors import MismatchError
from pipeline.io.address import Address, HubUrl
from pipeline.io.checked_json import DamagedError
from pipeline.io.folders import Folder, open_folder
from pipeline.io.hub_folder import remedy_for_absence
from pipeline.io.zarr_shards import decode_shard, read_object
from pipeline.logit_cache.codec import Arrays, decode, to_topk
from pipeline.logit_cache.format import COMMITS, Fingerprint
from pipeline.logit_cache.layout import (
    CacheLayout,
    damage_as_sentence,
    load_id_order,
    load_layout,
    read_marker,
    shards_with_marker,
)
from pipeline.model.folder import hash_weights
from pipeline.targets.topk import TopK


@dataclass(frozen=True)
class CacheShard(Shard):
    """A shard with the teacher's arrays for its rows; at K = 64 it takes 264 bytes per token."""

    arrays: Arrays


class CacheReader:
    """The complete cache of one split, bound to the corpus split it was made from.

    Args:
        address: the cache, for example cache/logits.zarr, which contains the split's group.
        corpus: the split with the rows that the cache describes.
        k: use only the first k stored ids; None uses all.

    Raises:
        MismatchError: the cache is missing, incomplete, damaged, or made from another corpus.
    """

    def __init__(self, address: Address, corpus: CorpusSplit, *, k: int | None = None) -> None:
        self.address = address / corpus.split
        self.corpus = corpus
        self._folder = open_folder(self.address)
        with damage_as_sentence(self.address):
            layout = load_layout(self._folder, str(self.address))
        if layout is None:
            make = remedy_for_absence(self.address, "run stages/prepare.py (or `dvc repro`)")
            raise MismatchError(f"{self.address} does not exist: {make}")
        self.layout = layout
        require_corpus(layout.fingerprint, corpus, self.address)
        marked = shards_with_marker(self._folder, layout)
        if missing := set(range(layout.num_shards)).difference(marked):
            command = "run stages/prepare.py to capture what is missing"
            if layout.fingerprint.imported_from:
                command = "run stages/convert.py to import what is missing"
            raise MismatchError(
                f"shard {min(missing)} of {layout.num_shards} in {self.address} is not captured: "
                f"{remedy_for_absence(self.address, command)}"
            )
        with damage_as_sentence(self.address):
            self.id_order = load_id_order(self._folder, layout)
        self._k = k
        self._kept: OrderedDict[int, CacheShard] = OrderedDict()
        if k is not None and k > self.fingerprint.k:
            raise MismatchError(
                f"k={k} ids are wanted, {self.address} stores {self.fingerprint.k}: lower train.k, "
                "or capture with a larger prepare.k"
            )
        if k is not None and k < self.fingerprint.k and self.fingerprint.num_sampled:
            raise MismatchError(
                f"k={k} ids are wanted, but the sampled ids of {self.address} were taken outside "
                f"its {self.fingerprint.k}: set train.k to null"
            )

    @property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the cache's inputs."""
        return self.layout.fingerprint

    def num_bytes(self) -> int:
        """Return the size in bytes of all committed shards, from their markers."""
        total = 0
        for shard in range(self.layout.num_shards):
            with self._checked(shard):
                marker = read_marker(self._folder, shard)
            total += sum(size for size, _ in marker.objects.values())
        return total

    def shard(self, number: int) -> CacheShard:
        """Read, check and decode one shard. Safe to call from several threads.

        Raises:
            MismatchError: the shard is damaged, or the corpus rows have changed since the capture.
        """
        layout = self.layout
        with self._checked(number):
            rows, arrays = read_shard_arrays(self._folder, layout, self.corpus, number)
        for name in ("ids", "logprobs"):  # keep the first k of the K ids
            if name in arrays and self._k is not None:
                arrays[name] = np.ascontiguousarray(arrays[name][..., : self._k])
        return CacheShard(first=layout.rows_of(number)[0], rows=rows, arrays=arrays)

    def top_k(self, rows: NDArray[np.int64]) -> TopK:
        """Return the TopK [n, L, K] of any rows; the last two shards read stay in memory."""
        shards = [self._keep(int(row) // self.layout.shard_rows) for row in rows]
        return self.gather([(shard, int(row)) for shard, row in zip(shards, rows, strict=True)])

    def gather(self, places: list[tuple[CacheShard, int]]) -> TopK:
        """Return the TopK [n, L, K] of corpus rows from shards that are in memory."""
        arrays: Arrays = {}
        for name in places[0][0].arrays:
            parts = [shard.arrays[name][row - shard.first] for shard, row in places]
            arrays[name] = _stack(parts)
        try:
            return to_topk(arrays, self.id_order, self.fingerprint)
        except IndexError:
            raise MismatchError(
                f"{self.address} holds indices beyond its {self.fingerprint.vocab_size} ids: "
                "capture it again with stages/prepare.py --overwrite"
            ) from None

    def _keep(self, number: int) -> CacheShard:
        if number not in self._kept:
            self._kept[number] = self.shard(number)
            while len(self._kept) > 2:
                self._kept.popitem(last=False)
        return self._kept[number]

    def _checked(self, shard: int) -> AbstractContextManager[None]:
        return damage_as_sentence(self.address, shard)


def require_corpus(fingerprint: Fingerprint, corpus: CorpusSplit, where: Address) -> None:
    """Refuse a cache that was made from another corpus.

    Raises:
        MismatchError: a field of the fingerprint differs; the message names it.
    """
    info = corpus.info
    longer = "run stages/prepare.py to capture the rows that were added"
    other = "capture again with stages/prepare.py --overwrite"
    if isinstance(where, HubUrl):
        longer = other = "set paths.corpus to the corpus in the cache's repository"
    if holds_first_rows(fingerprint, corpus):
        raise MismatchError(
            f"{where} holds the first {fingerprint.num_rows:,} of the {info.num_rows:,} rows that "
            f"{corpus.path} has by now: {longer}"
        )
    wanted = {
        "corpus_sha256": info.sha256,
        "tokenizer_sha256": info.tokenizer_sha256,
        "num_rows": info.num_rows,
        "row_length": info.row_length,
        "vocab_size": info.vocab_size,
    }
    for name, value in wanted.items():
        stored = getattr(fingerprint, name)
        if stored != value:
            raise MismatchError(
                f"{where} was captured with {name}={stored}, {corpus.path} has {value}: they do "
                f"not belong together, {other}"
            )


def require_teacher(reader: CacheReader, folder: Path) -> None:
    """Refuse a folder that holds another teacher than the cache's.

    Nothing says which weights an imported cache came from: `verify` compares it with a teacher.

    Args:
        folder: the teacher's folder; a reader of the cache needs none, so it may be absent.

    Raises:
        MismatchError: the folder holds another model.
    """
    if reader.fingerprint.imported_from or not (folder / "config.json").exists():
        return
    wanted, found = reader.fingerprint.teacher_sha256, hash_weights(folder)
    if found != wanted:
        on_hub = isinstance(reader.address, HubUrl)
        again = "" if on_hub else "capture again with stages/prepare.py --overwrite, or "
        raise MismatchError(
            f"{reader.address} was captured from teacher {wanted[:12]}, {folder} holds "
            f"{found[:12]}: {again}fetch the other teacher"
        )


def holds_first_rows(fingerprint: Fingerprint, corpus: CorpusSplit) -> bool:
    """Return whether a cache was made from the corpus before rows were added to it."""
    before = corpus.sha256_of_first(fingerprint.num_rows)
    return fingerprint.num_rows < len(corpus) and before == fingerprint.corpus_sha256


def read_shard_arrays(
    folder: Folder, layout: CacheLayout, corpus: CorpusSplit, shard: int, under: str = COMMITS
) -> tuple[Rows, Arrays]:
    """Read and check the corpus rows and decoded arrays of one shard.

    Args:
        under: see `read_marker`.

    Raises:
        DamagedError: an object, the marker, or the corpus rows are not what was committed.
    """
    marker = read_marker(folder, shard, under)
    start, stop = layout.rows_of(shard)
    if marker.shard != shard or marker.rows != (start, stop):
        raise DamagedError(f"its commit marker is that of shard {marker.shard}")
    if marker.cache != layout.checksum():
        raise DamagedError("it was captured for another cache in this place")
    rows = corpus.rows(start, stop)
    if hash_rows(rows) != marker.tokens_sha256:
        raise DamagedError(
            f"it was captured from other tokens than rows {start}..{stop} of {corpus.path} hold now"
        )
    chunks = {}
    for name, spec in layout.specs.items():
        key = spec.key_of(shard)
        data = read_object(folder, key, marker.objects.get(name, (0, "")))
        try:
            chunks[name] = decode_shard(spec, data, shard)
        except DamagedError as error:
            raise DamagedError(f"{key}: {error}") from None
    return rows, decode(chunks, layout.fingerprint)


def _stack(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Stack arrays [L, ...] of rows; those of distinct samples are as wide as their shard needs."""
    width = max(part.shape[-1] for part in parts)
    if all(part.shape[-1] == width for part in parts):
        return np.stack(parts)
    out = np.zeros((len(parts), *parts[0].shape[:-1], width), parts[0].dtype)
    for row, part in zip(out, parts, strict=True):
        row[..., : part.shape[-1]] = part
    return out
