"""The tokenized corpus on disk: `corpus.zarr` with the Zarr v3 groups `train` and `validation`.

Each group holds `tokens` (uint16 when the vocabulary fits, else uint32) and `doc_ids` (int32), both
[N, L], in shards of about 262,144 tokens (pipeline/sharding.py), and attributes that describe them.
The group's zarr.json, with the sha256 of all rows, is written last: without it the split does not
exist. The sha256 goes into the fingerprint of every cache made from the corpus, so a cache can not
be paired with other tokens.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.data.packing import PADDING, Rows
from pipeline.errors import DecantError
from pipeline.sharding import (
    ArraySpec,
    DamagedError,
    encode_shard,
    read_group,
    read_shard,
    write_group,
)
from pipeline.storage import Address, open_folder

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
_TOKENS_PER_CHUNK = 65_536
_CHUNKS_PER_SHARD = 4
_SHARDS_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What one split holds; stored as the group's attributes."""

    format_version: int
    num_rows: int  # N
    row_length: int  # L
    num_tokens: int  # without padding
    num_documents: int
    num_text_bytes: int  # UTF-8 bytes of the documents taken
    num_used_ids: int  # different token ids that occur
    vocab_size: int  # ids a tokenizer can produce: largest id + 1
    tokenizer_sha256: str
    sha256: str  # of tokens and doc_ids, row by row


def hash_rows(rows: Rows) -> str:
    """sha256 over rows: each row's tokens as little-endian uint32, then its doc_ids as int32."""
    return hashlib.sha256(_row_bytes(rows)).hexdigest()


def _row_bytes(rows: Rows) -> bytes:
    both = (rows.tokens.astype("<u4"), rows.doc_ids.astype("<i4").view("<u4"))
    return np.stack(both, axis=1).tobytes()


class SplitWriter:
    """Streams blocks of rows into a split; the split exists once `seal` has been called.

    Args:
        address: of the corpus; an older split there is removed.
    """

    def __init__(self, address: Address, split: str, *, row_length: int, vocab_size: int) -> None:
        self._root = open_folder(address)
        self._folder = open_folder(address / split)
        self._folder.remove("zarr.json")  # first: what is being removed no longer exists
        self._folder.remove()
        self._row_length = row_length
        self._used = np.zeros(vocab_size, dtype=bool)
        self._digest = hashlib.sha256()
        self._pending: list[Rows] = []
        self._num_rows = self._num_tokens = self._num_documents = self._num_shards = 0

    def add(self, rows: Rows) -> None:
        """Append rows; full shards are written at once."""
        self._digest.update(_row_bytes(rows))
        real = rows.doc_ids != PADDING
        self._used[rows.tokens[real]] = True
        self._num_tokens += int(real.sum())
        self._num_documents = max(self._num_documents, int(rows.doc_ids.max()) + 1)
        self._num_rows += len(rows)
        self._pending.append(rows)
        self._write_shards(final=False)

    @property
    def num_tokens(self) -> int:
        """Tokens so far, without padding."""
        return self._num_tokens

    def seal(self, *, num_text_bytes: int, tokenizer_sha256: str) -> SplitInfo:
        """Write what is pending, and the metadata that makes the split exist."""
        self._write_shards(final=True)
        info = SplitInfo(
            format_version=FORMAT_VERSION,
            num_rows=self._num_rows,
            row_length=self._row_length,
            num_tokens=self._num_tokens,
            num_documents=self._num_documents,
            num_text_bytes=num_text_bytes,
            num_used_ids=int(self._used.sum()),
            vocab_size=len(self._used),
            tokenizer_sha256=tokenizer_sha256,
            sha256=self._digest.hexdigest(),
        )
        write_group(self._root, [], {})
        write_group(self._folder, list(_specs(info).values()), asdict(info))
        return info

    def _write_shards(self, *, final: bool) -> None:
        specs = self._open_specs()
        size = specs["tokens"].shard_rows
        while (waiting := sum(map(len, self._pending))) >= size or (final and waiting):
            rows = Rows.cat(self._pending)
            for name, spec in specs.items():
                data = encode_shard(spec, getattr(rows, name)[:size])
                self._folder.write(spec.key_of(self._num_shards), data)
            self._pending = [Rows(rows.tokens[size:], rows.doc_ids[size:])]
            self._num_shards += 1

    def _open_specs(self) -> dict[str, ArraySpec]:
        return _array_specs(self._num_rows, self._row_length, len(self._used))


class CorpusSplit:
    """Read access to one split; `info` describes it.

    Raises:
        DecantError: absent, of another format, or damaged.
    """

    def __init__(self, address: Address, split: str) -> None:
        self.path = address
        self.split = split
        self._folder = open_folder(address / split)
        try:
            about = read_group(self._folder, str(address / split), FORMAT_VERSION)
        except DamagedError as error:
            raise DecantError(
                f"{address / split} is damaged ({error}): run stages/corpus.py again"
            ) from None
        if about is None:
            raise DecantError(
                f"{address} holds no complete {split} split: run stages/corpus.py (or `dvc repro`)"
            )
        self.info = SplitInfo(**about)
        self._specs = _specs(self.info)
        self._shards: OrderedDict[int, Future[Rows]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.info.num_rows

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start..stop in corpus order; the last shards read are kept.

        Raises:
            DecantError: a shard is damaged.
        """
        size = self._specs["tokens"].shard_rows
        parts = []
        for shard in range(start // size, max(start, stop - 1) // size + 1):
            rows, first = self._shard(shard), shard * size
            place = slice(max(start - first, 0), max(stop - first, 0))
            parts.append(Rows(rows.tokens[place].astype(np.int64), rows.doc_ids[place]))
        return parts[0] if len(parts) == 1 else Rows.cat(parts)

    def _shard(self, shard: int) -> Rows:
        """As stored: tokens in the narrow type."""
        with self._lock:
            ready = self._shards.get(shard)
            if mine := ready is None:
                ready = self._shards[shard] = Future()
                while len(self._shards) > _SHARDS_KEPT:
                    self._shards.popitem(last=False)
            else:
                self._shards.move_to_end(shard)
        assert ready is not None
        if mine:  # other threads wait for what this one reads
            try:
                ready.set_result(self._read(shard))
            except BaseException as error:
                with self._lock:
                    self._shards.pop(shard, None)
                ready.set_exception(error)
        return ready.result()

    def _read(self, shard: int) -> Rows:
        try:
            return Rows(
                tokens=read_shard(self._folder, self._specs["tokens"], shard),
                doc_ids=read_shard(self._folder, self._specs["doc_ids"], shard),
            )
        except DamagedError as error:
            raise DecantError(
                f"shard {shard} of {self.path / self.split} is damaged ({error}): run "
                "stages/corpus.py again"
            ) from None


def _specs(info: SplitInfo) -> dict[str, ArraySpec]:
    return _array_specs(info.num_rows, info.row_length, info.vocab_size)


def _array_specs(num_rows: int, row_length: int, vocab_size: int) -> dict[str, ArraySpec]:
    chunk_rows = max(1, _TOKENS_PER_CHUNK // row_length)
    dtypes = {"tokens": "uint16" if vocab_size <= 65_536 else "uint32", "doc_ids": "int32"}
    common: dict[str, Any] = {
        "shape": (num_rows, row_length),
        "chunk_rows": chunk_rows,
        "shard_rows": chunk_rows * _CHUNKS_PER_SHARD,
    }
    return {name: ArraySpec(name=name, dtype=dtype, **common) for name, dtype in dtypes.items()}
