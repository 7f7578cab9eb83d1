"""The tokenized corpus on disk: `corpus.zarr` with the Zarr v3 groups `train` and `validation`.

Each group holds three arrays [N, L]: `tokens` (uint16 when the vocabulary fits, else uint32),
`doc_ids` (int32, -1 for padding) and `in_loss` (uint8, 1 where the token is a target of training),
in shards of about 262,144 tokens (pipeline/io/zarr_shards.py), and attributes that describe them
(`SplitInfo`). A fourth array, `digests` [D, 16] uint8, holds the 16-byte BLAKE2b hash of every
document that was taken, or left out because none of its tokens is a target, so that an append knows
which documents are new.

The sha256 of a split is a chain over its rows (`chain_rows`), so that of the first rows does not
change when rows are added; `prefixes` lists it for every number of rows that the split has had. It
is part of the fingerprint of every cache made from the corpus, so a cache cannot be paired with
other tokens, documents or targets.

`objects/<hash>.json` lists the size and xxh3 of every shard (`Objects`); its own size and hash are
in the group's zarr.json. Each shard is compared with it whenever it is read, so a shard that comes
from another corpus, or lies in the wrong place, is detected. Hashing all rows by sha256 instead
would take as long as training's first epoch takes to read them.

The group's zarr.json is written last, and atomically: without it the split does not exist, and an
append (pipeline/data/corpus_writer.py) takes effect when it is replaced. An append also rewrites
the last, short shard of each array. Before that it lists the shard's new size and hash as an
alternative (`Objects.tails`). The new shard begins with the rows of the old one, so whichever of
the two is found, the split has the rows that its zarr.json describes. Hence a process that is
killed at any moment leaves either the old split or the new one.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.packing import Rows
from pipeline.errors import DecantError, MismatchError
from pipeline.io.address import Address
from pipeline.io.checked_json import DamagedError, Length, Number, Sha256, Size, parse
from pipeline.io.folders import Folder, open_folder
from pipeline.io.hub_folder import remedy_for_absence, remedy_for_damage
from pipeline.io.zarr_groups import read_group
from pipeline.io.zarr_shards import ArraySpec, Entry, entry_of, read_object, read_shard
from pipeline.model.folder import POINTER

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
OBJECTS = "objects"
DIGESTS = "digests"
_ROW_ARRAYS = ("tokens", "doc_ids", "in_loss")
DIGEST_BYTES = 16
NO_ROWS = "0" * 64
"""The sha256 chain of no rows."""
_TOKENS_PER_CHUNK = 65_536
_DIGESTS_PER_CHUNK = 16_384
_CHUNKS_PER_SHARD = 4
_SHARDS_KEPT = 2
IMPORTED, ROLLOUTS = "imported_from", "rollouts"
"""Keys of the `source.json` of a corpus that stages/corpus.py has not made."""


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
    num_digests: Number  # D
    num_text_bytes: Number  # UTF-8 bytes of the documents; for chats, as the template writes them
    num_used_ids: Number  # distinct token ids that occur
    leading_ids: tuple[Number, ...]  # ids put before each text, usually BOS; chats have their own
    vocab_size: Length  # ids a tokenizer can produce: largest id + 1
    tokenizer_sha256: Sha256
    sha256: Sha256  # of all arrays, row by row (`chain_rows`)
    prefixes: tuple[tuple[Size, Sha256], ...]  # N and sha256 as built, and after every append
    objects: Entry  # bytes and hash of `objects/<hash>.json`

    @property
    def num_positions(self) -> int:
        """Number of positions: tokens and padding."""
        return self.num_rows * self.row_length

    @property
    def num_padding(self) -> int:
        """Number of positions that hold no token."""
        return self.num_positions - self.num_tokens


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The sizes and hashes of a split's objects, and the ids that occur in its rows."""

    shards: dict[str, list[Entry]]  # of each array, in order
    tails: dict[str, Entry]  # of an array's last shard, as an unfinished append may have left it
    used_ids: Annotated[str, Field(pattern="^([0-9a-f]{2})*$")]  # one bit each, lowest first


def hash_rows(rows: Rows) -> str:
    """Return the sha256 of rows.

    For each row it covers the tokens as little-endian uint32, then doc_ids as little-endian int32,
    then in_loss as uint8 (0 or 1).
    """
    return hashlib.sha256(_row_bytes(rows)).hexdigest()


def chain_rows(rows: Rows, before: str = NO_ROWS) -> str:
    """Extend the sha256 chain of the rows before these.

    With h_0 of 32 zero bytes, h_i is the sha256 of h_(i-1) followed by the bytes of row i, which
    are those that `hash_rows` covers.
    """
    chained, last = _row_bytes(rows), bytes.fromhex(before)
    size = len(chained) // len(rows)
    for start in range(0, len(chained), size):
        last = hashlib.sha256(last + chained[start : start + size]).digest()
    return last.hex()


def _row_bytes(rows: Rows) -> bytes:
    arrays = (rows.tokens.astype("<u4"), rows.doc_ids.astype("<i4"), rows.in_loss.astype("u1"))
    return np.hstack([np.ascontiguousarray(array).view(np.uint8) for array in arrays]).tobytes()


def digest_of_tokens(tokens: Sequence[int] | NDArray[np.int64]) -> bytes:
    """Return the digest of a document that comes as tokens, not as text."""
    data = np.asarray(tokens, dtype="<u4").tobytes()
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


class CorpusSplit:
    """Read access to one split; `info` describes it.

    Raises:
        DecantError: the split is missing, damaged, of another format, or not a corpus.
    """

    def __init__(self, address: Address, split: str) -> None:
        self.path = address
        self.split = split
        self._folder = open_folder(address / split)
        with self._damage_as_sentence(""):
            info = read_info(self._folder, str(address / split))
            if info is None:
                make = remedy_for_absence(address, "run stages/corpus.py (or `dvc repro`)")
                raise DecantError(f"{address} holds no complete {split} split: {make}")
            self.info = info
            self._specs = split_specs(info)
            self.objects = _read_objects(self._folder, info, self._specs)
        self._shards: OrderedDict[int, Future[Rows]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.info.num_rows

    def sha256_of_first(self, num_rows: int) -> str | None:
        """Return the sha256 that the split had with this number of rows; None if it never did."""
        return dict(self.info.prefixes).get(num_rows)

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

    def digests(self) -> Iterator[bytes]:
        """Yield the digest of every document that was taken, or left out without a target.

        Raises:
            DecantError: a shard is damaged.
        """
        for shard in range(self._specs[DIGESTS].num_shards):
            with self._damage_as_sentence(f"shard {shard} of "):
                values = self._read_array(DIGESTS, shard)
            yield from map(bytes, values)

    def short_shards(self) -> dict[str, tuple[Entry, NDArray[Any]]]:
        """Return the last shard of each array whose last shard is short, with size and hash.

        Raises:
            DecantError: a shard is damaged.
        """
        found = {}
        for name, spec in self._specs.items():
            if spec.shape[0] % spec.shard_rows:
                with self._damage_as_sentence(f"shard {spec.num_shards - 1} of "):
                    values = self._read_array(name, spec.num_shards - 1)
                data = self._folder.read(spec.key_of(spec.num_shards - 1))
                found[name] = entry_of(spec.key_of(spec.num_shards - 1), data), values
        return found

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
        with self._damage_as_sentence(f"shard {shard} of "):
            return Rows(**{name: self._read_array(name, shard) for name in _ROW_ARRAYS})

    def _read_array(self, name: str, shard: int) -> NDArray[Any]:
        """Read a shard of an array; an append may have lengthened the last one meanwhile."""
        spec = self._specs[name]
        try:
            return read_shard(self._folder, spec, shard, self.objects.shards[name][shard])
        except DamagedError:
            if shard < spec.num_shards - 1:
                raise
            for entry in self._entries_of_tail(name, shard):
                with suppress(DamagedError):
                    return read_shard(self._folder, spec, shard, entry)
            raise

    def _entries_of_tail(self, name: str, shard: int) -> Iterator[Entry]:
        """Yield what else the last shard may be, by the split's metadata as it is now."""
        info = read_info(self._folder, str(self.path / self.split))
        if info is None or (self.info.num_rows, self.info.sha256) not in info.prefixes:
            return
        objects = _read_objects(self._folder, info, split_specs(info))
        yield objects.shards[name][shard]
        if name in objects.tails:
            yield objects.tails[name]

    @contextmanager
    def _damage_as_sentence(self, what: str) -> Iterator[None]:
        try:
            yield
        except DamagedError as error:
            raise DecantError(
                f"{what}{self.path / self.split} is damaged ({error}): "
                f"{remedy_for_damaged_corpus(self.path, self.split)}"
            ) from None


def read_made_from(address: Address) -> dict[str, Any]:
    """Read the `source.json` of a corpus; empty if there is none that can be read."""
    try:
        found = json.loads(open_folder(address).read(POINTER))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def other_text(address: Address, imported_from: str | None) -> str | None:
    """Describe the text of a corpus that was not made from corpus.*; None if it was.

    Args:
        imported_from: the format that its cache was imported from, which a published corpus does
            not say.
    """
    made_from = read_made_from(address)
    if origin := imported_from or made_from.get(IMPORTED):
        return f"unrecorded text, imported from {origin}"
    if sha256 := rollouts_model(made_from):
        return f"rollouts of the model with sha256 {sha256[:12]}"
    return None


def rollouts_model(made_from: dict[str, Any]) -> str | None:
    """Return the sha256 of the model that wrote a corpus of rollouts; None for another corpus."""
    found = made_from.get(ROLLOUTS)
    return str(found["model"]) if isinstance(found, dict) and "model" in found else None


def remedy_for_damaged_corpus(address: Address, split: str) -> str:
    """Return what to do about a damaged split: the command of the stage that made the corpus."""
    made_from = read_made_from(address)
    command = "run stages/corpus.py --overwrite"
    if IMPORTED in made_from:
        command = "run stages/convert.py --overwrite"
    elif ROLLOUTS in made_from:  # the journal beside it still has every sampled token
        command = f"remove {address}, then run stages/rollouts.py"
    return remedy_for_damage(address / split, command)


def read_info(folder: Folder, where: str) -> SplitInfo | None:
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


def objects_key(entry: Entry) -> str:
    """Return the key of the list of objects that has this size and hash."""
    return f"{OBJECTS}/{entry[1]}.json"


def _read_objects(folder: Folder, info: SplitInfo, specs: dict[str, ArraySpec]) -> Objects:
    """Read size and hash of each shard; check that their number fits the number of rows."""
    key = objects_key(info.objects)
    text = read_object(folder, key, None)  # its hash is part of the key, so it cannot cover that
    if entry_of(OBJECTS, text) != info.objects:
        raise DamagedError(f"{key} does not match its hash")
    try:
        objects = parse(Objects, json.loads(text), key)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{key} cannot be read ({error})") from None
    counts = {name: len(entries) for name, entries in objects.shards.items()}
    if counts != {name: spec.num_shards for name, spec in specs.items()}:
        raise DamagedError(f"{key} lists other shards than {info.num_rows:,} rows make")
    return objects


def split_specs(info: SplitInfo) -> dict[str, ArraySpec]:
    """Return the arrays of a split, by name."""
    rows = row_specs(info.num_rows, info.row_length, info.vocab_size)
    return rows | {DIGESTS: digests_spec(info.num_digests)}


def row_specs(num_rows: int, row_length: int, vocab_size: int) -> dict[str, ArraySpec]:
    """Return the arrays that hold one entry per row, by name."""
    chunk_rows = max(1, _TOKENS_PER_CHUNK // row_length)
    token_dtype = "uint16" if vocab_size <= 65_536 else "uint32"
    dtypes = dict(zip(_ROW_ARRAYS, (token_dtype, "int32", "uint8"), strict=True))
    common: dict[str, Any] = {
        "shape": (num_rows, row_length),
        "chunk_rows": chunk_rows,
        "shard_rows": chunk_rows * _CHUNKS_PER_SHARD,
        "dimension_names": ("row", "position"),
    }
    return {name: ArraySpec(name=name, dtype=dtype, **common) for name, dtype in dtypes.items()}


def digests_spec(num_digests: int) -> ArraySpec:
    """Return the array of the documents' digests."""
    return ArraySpec(
        name=DIGESTS,
        shape=(num_digests, DIGEST_BYTES),
        dtype="uint8",
        chunk_rows=_DIGESTS_PER_CHUNK,
        shard_rows=_DIGESTS_PER_CHUNK * _CHUNKS_PER_SHARD,
        dimension_names=("document", "byte"),
    )
