"""The tokenized corpus on disk: `corpus.zarr` with the Zarr v3 groups `train` and `validation`.

Each group holds three arrays [N, L]: `tokens` (uint16 when the vocabulary fits, else uint32),
`doc_ids` (int32, -1 for padding) and `in_loss` (uint8, 1 where the token is a target of training),
in shards of about 262,144 tokens (pipeline/io/zarr_shards.py), and attributes that describe them.
The group's zarr.json, with the sha256 of all rows, is written last: without it the split does not
exist. The sha256 is part of the fingerprint of every cache made from the corpus, so a cache cannot
be paired with other tokens, documents or targets.

`objects.json` beside the arrays lists the size and xxh3 of every shard, {array: [[bytes, hash],
...]}, and its own hash is in zarr.json. Each shard is compared with it whenever it is read, so a
shard that comes from another corpus, or lies in the wrong place, is detected. Hashing all rows by
sha256 instead would take as long as training's first epoch takes to read them.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from pipeline.data.packing import PADDING, Rows
from pipeline.errors import DecantError, MismatchError
from pipeline.io.address import Address
from pipeline.io.checked_json import DamagedError, Length, Number, Sha256, Size, parse
from pipeline.io.folders import Folder, open_folder
from pipeline.io.ownership import claim
from pipeline.io.zarr_groups import read_group, write_group
from pipeline.io.zarr_shards import (
    ArraySpec,
    Entry,
    encode_shard,
    object_hash,
    read_object,
    read_shard,
)

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
_TOKENS_PER_CHUNK = 65_536
_CHUNKS_PER_SHARD = 4
_SHARDS_KEPT = 2
_OBJECTS = "objects.json"
_REMEDY = "run stages/corpus.py --overwrite"


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The description of one split, stored as the group's attributes."""

    format_version: int
    num_rows: Size  # N
    row_length: Length  # L
    num_tokens: Size  # without padding
    num_in_loss: Number  # number of these tokens that are targets
    num_documents: Size
    num_dropped: Number  # documents left out because none of their tokens is a target
    num_text_bytes: Number  # UTF-8 bytes of the documents; for chats, as the template writes them
    num_used_ids: Number  # distinct token ids that occur
    leading_ids: tuple[Number, ...]  # ids put before each text, usually BOS; chats have their own
    vocab_size: Length  # ids a tokenizer can produce: largest id + 1
    tokenizer_sha256: Sha256
    sha256: Sha256  # of all arrays, row by row (`hash_rows`)
    objects: Entry  # bytes and hash of objects.json

    @property
    def num_positions(self) -> int:
        """Number of positions: tokens and padding."""
        return self.num_rows * self.row_length

    @property
    def num_padding(self) -> int:
        """Number of positions that hold no token."""
        return self.num_positions - self.num_tokens


def hash_rows(rows: Rows) -> str:
    """Return the sha256 of rows.

    For each row it covers the tokens as little-endian uint32, then doc_ids as little-endian int32,
    then in_loss as uint8 (0 or 1).
    """
    return hashlib.sha256(_row_bytes(rows)).hexdigest()


def _row_bytes(rows: Rows) -> bytes:
    arrays = (rows.tokens.astype("<u4"), rows.doc_ids.astype("<i4"), rows.in_loss.astype("u1"))
    return np.hstack([np.ascontiguousarray(array).view(np.uint8) for array in arrays]).tobytes()


class SplitWriter:
    """A writer of blocks of rows to a split, which exists once `commit` has been called.

    Args:
        address: address of the corpus; an existing split there is removed only when the first rows
            of the new one arrive, so nothing is lost if the source cannot be read.

    Raises:
        MismatchError: something else is there, for example a logit cache or the user's own text.
    """

    def __init__(self, address: Address, split: str, *, row_length: int, vocab_size: int) -> None:
        self._root = open_folder(address)
        self._where = str(address / split)
        self._folder = open_folder(address / split)
        claim(address, "corpus", key="paths.corpus")
        self._row_length = row_length
        self._used = np.zeros(vocab_size, dtype=bool)
        self._digest = hashlib.sha256()
        self._pending: list[Rows] = []
        self._num_rows = self._num_tokens = self._num_documents = self._num_shards = 0
        self._num_in_loss = 0
        self._objects: dict[str, list[Entry]] = {name: [] for name in self._open_specs()}

    def add(self, rows: Rows) -> None:
        """Append at least one row; full shards are written immediately."""
        if not self._num_rows:
            # zarr.json is removed first: without it the split does not exist.
            for name in ("zarr.json", _OBJECTS, *self._open_specs()):
                self._folder.remove(name)
        self._digest.update(_row_bytes(rows))
        real = rows.doc_ids != PADDING
        self._used[rows.tokens[real]] = True
        self._num_tokens += int(real.sum())
        self._num_in_loss += int(rows.in_loss.sum())
        self._num_documents = max(self._num_documents, int(rows.doc_ids.max()) + 1)
        self._num_rows += len(rows)
        self._pending.append(rows)
        self._write_shards(final=False)

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far, without padding."""
        return self._num_tokens

    def commit(
        self,
        *,
        num_text_bytes: int,
        tokenizer_sha256: str,
        num_dropped: int = 0,
        leading_ids: tuple[int, ...] = (),
    ) -> SplitInfo:
        """Write the pending rows, and the metadata that makes the split exist.

        Raises:
            DecantError: another process has written the split meanwhile.
        """
        self._write_shards(final=True)
        objects = json.dumps(self._objects).encode()
        self._folder.write(_OBJECTS, objects)
        info = SplitInfo(
            format_version=FORMAT_VERSION,
            num_rows=self._num_rows,
            row_length=self._row_length,
            num_tokens=self._num_tokens,
            num_in_loss=self._num_in_loss,
            num_documents=self._num_documents,
            num_dropped=num_dropped,
            num_text_bytes=num_text_bytes,
            num_used_ids=int(self._used.sum()),
            leading_ids=leading_ids,
            vocab_size=len(self._used),
            tokenizer_sha256=tokenizer_sha256,
            sha256=self._digest.hexdigest(),
            objects=(len(objects), object_hash(_OBJECTS, objects)),
        )
        write_group(self._root, [], {})
        write_group(self._folder, list(_specs(info).values()), asdict(info))
        if _read_info(self._folder, self._where) != info:
            raise DecantError(
                f"{self._where} was made by another process meanwhile: wait until that has ended, "
                "then run stages/corpus.py again"
            )
        return info

    def _write_shards(self, *, final: bool) -> None:
        specs = self._open_specs()
        size = specs["tokens"].shard_rows
        while (waiting := sum(map(len, self._pending))) >= size or (final and waiting):
            rows = Rows.cat(self._pending)
            for name, spec in specs.items():
                data = encode_shard(spec, getattr(rows, name)[:size])
                key = spec.key_of(self._num_shards)
                self._folder.write(key, data)
                self._objects[name].append((len(data), object_hash(key, data)))
            self._pending = [rows[size:]]
            self._num_shards += 1

    def _open_specs(self) -> dict[str, ArraySpec]:
        return _array_specs(self._num_rows, self._row_length, len(self._used))


class CorpusSplit:
    """Read access to one split; `info` describes it.

    Raises:
        DecantError: the split is missing, damaged, of another format, or not a corpus.
    """

    def __init__(self, address: Address, split: str) -> None:
        self.path = address
        self.split = split
        self._folder = open_folder(address / split)
        where = str(address / split)
        try:
            info = _read_info(self._folder, where)
            if info is None:
                raise DecantError(
                    f"{address} holds no complete {split} split: run stages/corpus.py (or `dvc "
                    "repro`)"
                )
            self.info = info
            self._specs = _specs(info)
            self._objects = _read_objects(self._folder, info, self._specs)
        except DamagedError as error:
            raise DecantError(f"{where} is damaged ({error}): {_REMEDY}") from None
        self._shards: OrderedDict[int, Future[Rows]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.info.num_rows

    def rows(self, start: int, stop: int) -> Rows:
        """Return rows start..stop in corpus order; the last shards read stay in memory.

        Raises:
            DecantError: a shard is damaged.
        """
        size = self._specs["tokens"].shard_rows
        parts = []
        for shard in range(start // size, max(start, stop - 1) // size + 1):
            rows, first = self._shard(shard), shard * size
            found = rows[max(start - first, 0) : max(stop - first, 0)]
            parts.append(
                Rows(found.tokens.astype(np.int64), found.doc_ids, found.in_loss.astype(np.bool_))
            )
        return parts[0] if len(parts) == 1 else Rows.cat(parts)

    def _shard(self, shard: int) -> Rows:
        """Return a shard as stored, in the narrow types."""
        with self._lock:
            ready = self._shards.get(shard)
            if mine := ready is None:
                ready = self._shards[shard] = Future()
                while len(self._shards) > _SHARDS_KEPT:
                    self._shards.popitem(last=False)
            else:
                self._shards.move_to_end(shard)
        assert ready is not None
        if mine:  # this thread reads the shard, and other threads wait for it
            try:
                ready.set_result(self._read(shard))
            except BaseException as error:
                with self._lock:
                    self._shards.pop(shard, None)
                ready.set_exception(error)
        return ready.result()

    def _read(self, shard: int) -> Rows:
        try:
            arrays = {
                name: read_shard(self._folder, spec, shard, self._objects[name][shard])
                for name, spec in self._specs.items()
            }
            return Rows(**arrays)
        except DamagedError as error:
            raise DecantError(
                f"shard {shard} of {self.path / self.split} is damaged ({error}): {_REMEDY}"
            ) from None


def _read_info(folder: Folder, where: str) -> SplitInfo | None:
    """Read the description of a split; None if there is no split.

    Raises:
        MismatchError: the group is not a corpus.
        DamagedError: the metadata is not what was written.
    """
    about = read_group(folder, where, FORMAT_VERSION)
    if about is None:
        return None
    if about.keys() != {field.name for field in fields(SplitInfo)}:
        raise MismatchError(
            f"{where} is not a corpus of this version of Decant: set paths.corpus to one, or make "
            "it there by stages/corpus.py"
        )
    return parse(SplitInfo, about, "its zarr.json")


def _read_objects(
    folder: Folder, info: SplitInfo, specs: dict[str, ArraySpec]
) -> dict[str, list[Entry]]:
    """Read size and hash of each shard; check that their number fits the number of rows."""
    text = read_object(folder, _OBJECTS, info.objects)
    try:
        objects = parse(dict[str, list[Entry]], json.loads(text), _OBJECTS)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{_OBJECTS} cannot be read ({error})") from None
    counts = {name: len(entries) for name, entries in objects.items()}
    if counts != {name: spec.num_shards for name, spec in specs.items()}:
        raise DamagedError(f"{_OBJECTS} lists other shards than {info.num_rows:,} rows make")
    return objects


def _specs(info: SplitInfo) -> dict[str, ArraySpec]:
    return _array_specs(info.num_rows, info.row_length, info.vocab_size)


def _array_specs(num_rows: int, row_length: int, vocab_size: int) -> dict[str, ArraySpec]:
    chunk_rows = max(1, _TOKENS_PER_CHUNK // row_length)
    token_dtype = "uint16" if vocab_size <= 65_536 else "uint32"
    dtypes = {"tokens": token_dtype, "doc_ids": "int32", "in_loss": "uint8"}
    common: dict[str, Any] = {
        "shape": (num_rows, row_length),
        "chunk_rows": chunk_rows,
        "shard_rows": chunk_rows * _CHUNKS_PER_SHARD,
        "dimension_names": ("row", "position"),
    }
    return {name: ArraySpec(name=name, dtype=dtype, **common) for name, dtype in dtypes.items()}
