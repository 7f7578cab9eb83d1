"""Encode or decode a whole shard of a Zarr v3 array in one call.

Any Zarr v3 reader can open the arrays: zarr itself writes `<array>/zarr.json`
(pipeline/io/zarr_groups.py), and each shard is one object at `<array>/c/<shard>/0/0`.

A shard consists of its chunks one after another, then the index: offset and length of each chunk,
uint64 little-endian, and the crc32c of that table. A chunk consists of the array's values,
little-endian, compressed by blosc (zstd level 1, byte shuffle, blocks of 262,144 bytes), then the
crc32c of the compressed bytes.

zarr writes the same bytes (tests/io/test_zarr_shards.py). This module encodes and decodes them
instead, for two reasons; docs/benchmarks.md has the measurements.

- Speed. zarr spends 1 to 2 ms on a small array of a shard, this module 0.1 ms. With five arrays and
  8,192 tokens per shard, zarr 3.1.6 decodes at 0.13 times this module's speed. zarr 3.4.2 with its
  FusedCodecPipeline, which is experimental and needs Python 3.12, decodes at 0.10 times.
- Untrusted bytes. zarr decompresses a chunk before it compares its size with the array's, so a
  shard of 140 kB can take 1 GiB of memory. It reads a chunk as zeros if the index calls it missing,
  and its errors do not name the chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numcodecs import Blosc
from numpy.typing import NDArray

from pipeline.io.checked_json import DamagedError, Number, crc32c
from pipeline.io.folders import Folder

BLOCK_BYTES = 262_144
_BLOSC = Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE, blocksize=BLOCK_BYTES)
_CRC_BYTES = 4

Entry = tuple[Number, str]
"""An object's size in bytes and its `object_hash`."""


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a group, cut along its first axis."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # NumPy's name; stored little-endian
    chunk_rows: int  # rows per chunk, the unit of compression
    shard_rows: int  # rows per shard, a multiple of chunk_rows; the unit of reading and writing
    dimension_names: tuple[str, ...] | None = None  # in zarr's metadata

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk in bytes before compression."""
        return math.prod(self.chunk_shape) * np.dtype(self.dtype).itemsize

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of a chunk."""
        return (self.chunk_rows, *self.shape[1:])

    @property
    def num_shards(self) -> int:
        """Number of shards that hold all rows; the last one may be short."""
        return -(-self.shape[0] // self.shard_rows)

    def rows_of(self, shard: int) -> tuple[int, int]:
        """Return a shard's first row, and the row after its last one."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.shape[0])

    def key_of(self, shard: int) -> str:
        """Return a shard's key: `<array>/c/<shard>`, then one `/0` for each further axis."""
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


def entry_of(key: str, data: bytes) -> Entry:
    """Return the size and hash of an object."""
    return len(data), object_hash(key, data)


def read_object(folder: Folder, key: str, entry: Entry | None) -> bytes:
    """Read an object, and check that its size and hash are those recorded when it was written.

    Args:
        entry: the recorded size and hash; None checks nothing.

    Raises:
        DamagedError: the object is missing or differs.
    """
    try:
        data = folder.read(key)
    except FileNotFoundError:
        raise DamagedError(f"{key} is missing") from None
    if entry is not None:
        size, checksum = entry
        if len(data) != size:
            raise DamagedError(f"{key} has {len(data)} bytes, but {size} were written")
        if object_hash(key, data) != checksum:
            raise DamagedError(f"{key} does not match its hash")
    return data


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
        data = bytes(_BLOSC.encode(part))
        chunks.append(data + crc32c(data).to_bytes(_CRC_BYTES, "little"))
    lengths = np.array([len(chunk) for chunk in chunks], dtype="<u8")
    index = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1).astype("<u8").tobytes()
    return b"".join([*chunks, index, crc32c(index).to_bytes(_CRC_BYTES, "little")])


def decode_shard(spec: ArraySpec, data: bytes, shard: int) -> list[NDArray[Any]]:
    """Decode the chunks of a shard, each [rows, ...].

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
            values = np.frombuffer(_BLOSC.decode(body), spec.dtype).reshape(spec.chunk_shape)
        except (RuntimeError, ValueError) as error:
            raise DamagedError(f"chunk {number} cannot be decompressed ({error})") from None
        rest = stop - start - first  # cuts off the padding of an array's last chunk
        chunks.append(values[:rest])
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
    """Read one shard, [rows, ...].

    Args:
        entry: size and hash to compare the object with; None checks only its own checksums.

    Raises:
        DamagedError: the shard is missing or does not match its checksums.
    """
    data = read_object(folder, spec.key_of(shard), entry)
    return np.concatenate(decode_shard(spec, data, shard))
