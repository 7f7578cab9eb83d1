"""Encode or decode a whole shard of a Zarr v3 array in one call.

Any Zarr v3 reader can open the arrays: zarr itself writes `<array>/zarr.json`, and each shard is
one object at `<array>/c/<shard>/0/0`. This module encodes and decodes the bytes of a shard instead
of zarr, since a shard is the unit of everything (writing, resuming, reading, checking), and going
through zarr's general machinery costs more than the decompression. zarr is the plain twin
(tests/io/test_zarr_shards.py: each reads what the other wrote).

A shard consists of its chunks one after another, then the index: offset and length of each chunk,
uint64 little-endian, and the crc32c of that table. A chunk consists of the array's values (with the
last axis moved to the front if the spec says `last_axis_first`), little-endian, compressed by blosc
(zstd level 1, byte shuffle, blocks of 262,144 bytes), then the crc32c of the compressed bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import google_crc32c
import numpy as np
import xxhash
import zarr
from numcodecs import Blosc
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from pipeline.errors import MismatchError, shortened
from pipeline.io.object_store import Folder

_BLOCK_BYTES = 262_144
_BLOSC = Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE, blocksize=_BLOCK_BYTES)
_CRC_BYTES = 4


Kind = TypeVar("Kind")
Number = Annotated[int, Field(ge=0, le=2**40)]
"""A count in metadata; a larger one is damage, or meant to exhaust the memory."""
Size = Annotated[int, Field(ge=1, le=2**40)]
Length = Annotated[int, Field(ge=1, le=2**24)]
"""The number of tokens in a row, or of ids in a vocabulary."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Crc = Annotated[int, Field(ge=0, lt=2**32)]
Entry = tuple[Number, str]
"""An object's size in bytes and its `object_hash`."""


class DamagedError(ValueError):
    """Bytes that do not match their checksums or are malformed."""


def parse(kind: type[Kind], values: Any, what: str) -> Kind:
    """Convert JSON values to a dataclass, and check that each has its annotated type.

    A checksum proves that values are as they were written, but not who wrote them. Therefore the
    types of all metadata are checked here, so that no later code finds a list where it expects a
    number.

    Raises:
        DamagedError: a value has another type; the message names the first one.
    """
    try:
        found: Kind = _adapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        raise DamagedError(f"{what}: {where}: {first['msg']}") from None
    except RecursionError:
        raise DamagedError(f"{what} is nested too deeply") from None
    return found


_adapter: Callable[[Any], TypeAdapter[Any]] = lru_cache(TypeAdapter)


@dataclass(frozen=True)
class _Attributes:
    """The attributes of a group."""

    decant: dict[str, Any]
    arrays: dict[str, Crc]
    crc32c: Crc


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a group, cut along its first axis."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # NumPy's name; stored little-endian
    chunk_rows: int  # rows per chunk, the unit of compression
    shard_rows: int  # rows per shard, a multiple of chunk_rows; the unit of reading and writing
    last_axis_first: bool = False  # in storage: puts values of the same rank side by side

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk in bytes before compression."""
        return self.chunk_rows * math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def num_shards(self) -> int:
        """Number of shards that hold all rows; the last one may be short."""
        return -(-self.shape[0] // self.shard_rows)

    def rows_of(self, shard: int) -> tuple[int, int]:
        """Return a shard's first row, and the row after its last one."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.shape[0])

    def key_of(self, shard: int) -> str:
        """Return the key of the object that holds a shard: `<array>/c/<shard>/0/0`, as in zarr."""
        return "/".join([self.name, "c", str(shard), *["0"] * (len(self.shape) - 1)])


def object_hash(key: str, data: bytes) -> str:
    """Return the xxh3 (128 bits, hexadecimal) of an object and its key, for a commit marker.

    A crc32c would prove nothing here. The crc32c of data that ends with its own crc32c is a
    constant; since a shard's chunks and index all end with theirs, the crc32c of the shard depends
    only on their lengths.
    """
    digest = xxhash.xxh3_128(key.encode())
    digest.update(data)
    return digest.hexdigest()


def read_object(folder: Folder, key: str, entry: Entry) -> bytes:
    """Read an object, and check that its size and hash are those recorded when it was written.

    Raises:
        DamagedError: the object is missing or differs.
    """
    try:
        data = folder.read(key)
    except FileNotFoundError:
        raise DamagedError(f"{key} is missing") from None
    size, checksum = entry
    if len(data) != size:
        raise DamagedError(f"{key} has {len(data)} bytes, but {size} were written")
    if object_hash(key, data) != checksum:
        raise DamagedError(f"{key} does not match its hash")
    return data


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720) of bytes."""
    return int(google_crc32c.value(data))


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the key "crc32c", the crc32c of the values' JSON text."""
    return {**values, "crc32c": json_crc32c(values)}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Return whether the values are unchanged since they were sealed."""
    with suppress(RecursionError):
        rest = {name: value for name, value in values.items() if name != "crc32c"}
        return bool(values.get("crc32c") == json_crc32c(rest))
    return False


def json_crc32c(values: Mapping[str, Any]) -> int:
    """Return the crc32c of the values' JSON text: keys sorted, separators "," and ":"."""
    return crc32c(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())


def write_group(
    folder: Folder, specs: Sequence[ArraySpec], about: Mapping[str, Any], *, replace: bool = False
) -> None:
    """Write the metadata of a group and its arrays; the group's own comes last, only if absent.

    A group without its zarr.json does not exist, so a group whose writer was killed half-way is
    started again. If several processes write at once, one of them writes the group's metadata, and
    all of them then find the same.

    Args:
        replace: write the group's own metadata even if it exists, atomically.
        about: values for `read_group` to return; stored as the attribute "decant", beside the
            crc32c of each array's metadata ("arrays") and the crc32c of both ("crc32c").
    """
    memory = MemoryStore()
    group = zarr.create_group(memory)
    for spec in specs:
        axes = tuple(range(len(spec.shape)))
        group.create_array(
            spec.name,
            shape=spec.shape,
            dtype=spec.dtype,
            chunks=(spec.chunk_rows, *spec.shape[1:]),
            shards=(spec.shard_rows, *spec.shape[1:]),
            filters=[TransposeCodec(order=(axes[-1], *axes[:-1]))] if spec.last_axis_first else (),
            compressors=[
                BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", blocksize=_BLOCK_BYTES),
                Crc32cCodec(),
            ],
            dimension_names=("row", "position", "rank")[: len(spec.shape)],
        )
    checksums = {}
    for spec in specs:
        metadata = _object(memory, f"{spec.name}/zarr.json")
        folder.write(f"{spec.name}/zarr.json", metadata)
        checksums[spec.name] = crc32c(metadata)
    group.attrs.put(seal({"decant": dict(about), "arrays": checksums}))
    write = folder.write if replace else folder.create
    write("zarr.json", _object(memory, "zarr.json"))


def _object(memory: MemoryStore, key: str) -> bytes:
    buffer = sync(memory.get(key, default_buffer_prototype()))
    assert buffer is not None
    return buffer.to_bytes()


def read_group(folder: Folder, where: str, format_version: int) -> dict[str, Any] | None:
    """Return the values that `write_group` stored about the group; None if there is no group.

    Raises:
        MismatchError: the group was not written by Decant, or has another format version.
        DamagedError: the metadata is not what was written.
    """
    try:
        text = folder.read("zarr.json")
    except FileNotFoundError:
        return None
    try:
        values: Any = json.loads(text)
        attributes = values["attributes"]
        ours = {"zarr_format": 3, "node_type": "group"}.items() <= values.items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError("its zarr.json cannot be read") from None
    about = attributes.get("decant") if isinstance(attributes, dict) else None
    if not isinstance(about, dict):
        raise MismatchError(f"{where} was not written by Decant: remove it, or choose another path")
    if about.get("format_version", format_version) != format_version:
        raise MismatchError(
            f"{where} has format version {shortened(about['format_version'])}, this program reads "
            f"{format_version}: use the version of Decant that wrote it, or make it again"
        )
    if not ours or not is_sealed(attributes):
        raise DamagedError("its zarr.json does not match its crc32c")
    return parse(_Attributes, attributes, "its zarr.json").decant


def find_damaged_metadata(folder: Folder, specs: Sequence[ArraySpec]) -> list[str]:
    """Describe each array's zarr.json that does not match the crc32c in the group's metadata."""
    attributes = json.loads(folder.read("zarr.json"))["attributes"]
    checksums = parse(_Attributes, attributes, "zarr.json").arrays
    found = []
    for spec in specs:
        key = f"{spec.name}/zarr.json"
        try:
            if crc32c(folder.read(key)) != checksums.get(spec.name):
                found.append(f"{key} does not match its crc32c")
        except FileNotFoundError:
            found.append(f"{key} is missing")
    return found


def encode_shard(spec: ArraySpec, values: NDArray[Any]) -> bytes:
    """Encode one shard as the bytes of its object.

    Args:
        values: [rows, ...], up to spec.shard_rows rows; only an array's last shard may be short.
    """
    chunks: list[bytes] = []
    for start in range(0, spec.shard_rows, spec.chunk_rows):
        part = np.zeros((spec.chunk_rows, *spec.shape[1:]), dtype=spec.dtype)  # pads the last chunk
        found = values[start : start + spec.chunk_rows]
        part[: len(found)] = found
        if spec.last_axis_first:
            part = np.ascontiguousarray(np.moveaxis(part, -1, 0))
        data = bytes(_BLOSC.encode(part))
        chunks.append(data + crc32c(data).to_bytes(_CRC_BYTES, "little"))
    lengths = np.array([len(chunk) for chunk in chunks], dtype="<u8")
    index = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1).astype("<u8").tobytes()
    return b"".join([*chunks, index, crc32c(index).to_bytes(_CRC_BYTES, "little")])


def decode_shard(spec: ArraySpec, data: bytes, shard: int) -> list[NDArray[Any]]:
    """Decode the chunks of a shard, in the axis order in which they are stored.

    Each chunk is [rows, ...]; with `last_axis_first` the array's last axis is the chunk's first
    axis, so the chunk is [K, rows, ...] for an array [N, ..., K].

    Raises:
        DamagedError: a checksum, a length or the compressed data is wrong.
    """
    start, stop = spec.rows_of(shard)
    chunks = []
    for number, (offset, length) in enumerate(_index(spec, data)):
        first = number * spec.chunk_rows
        if first >= stop - start:
            break
        chunk = memoryview(data)[offset : offset + length]
        if len(chunk) != length or length <= _CRC_BYTES:
            raise DamagedError(f"chunk {number} lies outside the {len(data)} bytes")
        body = bytes(chunk[:-_CRC_BYTES])
        _require_size(body, spec.chunk_bytes, number)
        if crc32c(body) != int.from_bytes(chunk[-_CRC_BYTES:], "little"):
            raise DamagedError(f"the crc32c of chunk {number} is wrong")
        try:
            values = np.frombuffer(_BLOSC.decode(body), dtype=spec.dtype)
            if spec.last_axis_first:
                values = values.reshape(spec.shape[-1], spec.chunk_rows, *spec.shape[1:-1])
                chunks.append(values[:, : stop - start - first])
            else:
                values = values.reshape(spec.chunk_rows, *spec.shape[1:])
                chunks.append(values[: stop - start - first])
        except (RuntimeError, ValueError) as error:
            raise DamagedError(f"chunk {number} cannot be decompressed ({error})") from None
    return chunks


def _require_size(body: bytes, expected: int, number: int) -> None:
    """Check the sizes in a blosc header, by which blosc allocates memory before anything else.

    The header consists of four bytes of flags, then uncompressed size, block size and compressed
    size, each uint32.
    """
    sizes = [int.from_bytes(body[place : place + 4], "little") for place in (4, 12)]
    if len(body) < 16 or sizes != [expected, len(body)]:
        raise DamagedError(f"chunk {number} says that it holds {sizes[0]} bytes, not {expected}")


def _index(spec: ArraySpec, data: bytes) -> list[tuple[int, int]]:
    size = spec.shard_rows // spec.chunk_rows * 16
    if len(data) < size + _CRC_BYTES:
        raise DamagedError(f"{len(data)} bytes are too few for a shard")
    table = data[-size - _CRC_BYTES : -_CRC_BYTES]
    if crc32c(table) != int.from_bytes(data[-_CRC_BYTES:], "little"):
        raise DamagedError("the crc32c of its index is wrong")
    return [(int(a), int(b)) for a, b in np.frombuffer(table, dtype="<u8").reshape(-1, 2)]


def read_shard(
    folder: Folder, spec: ArraySpec, shard: int, entry: Entry | None = None
) -> NDArray[Any]:
    """Read one shard in the array's own axis order, [rows, ...].

    Args:
        entry: size and hash to compare the object with; None checks only its own checksums.

    Raises:
        DamagedError: the shard is missing or does not match its checksums.
    """
    key = spec.key_of(shard)
    if entry is not None:
        data = read_object(folder, key, entry)
    else:
        try:
            data = folder.read(key)
        except FileNotFoundError:
            raise DamagedError(f"{key} is missing") from None
    chunks = decode_shard(spec, data, shard)
    if spec.last_axis_first:
        chunks = [np.moveaxis(chunk, 0, -1) for chunk in chunks]
    return np.concatenate(chunks)
