"""The metadata of a Zarr v3 group and its arrays, with checksums.

zarr itself writes the JSON. The group's attributes hold the crc32c of each array's metadata and of
themselves, so that damage is found before any array is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from pipeline.errors import MismatchError, shortened
from pipeline.io.checked_json import (
    Crc,
    DamagedError,
    add_checksum,
    crc32c,
    has_valid_checksum,
    parse,
)
from pipeline.io.folders import Folder
from pipeline.io.zarr_shards import BLOCK_BYTES, ArraySpec


@dataclass(frozen=True)
class _Attributes:
    """The attributes of a group."""

    decant: dict[str, Any]
    arrays: dict[str, Crc]
    crc32c: Crc


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
        group.create_array(
            spec.name,
            shape=spec.shape,
            dtype=spec.dtype,
            chunks=(spec.chunk_rows, *spec.shape[1:]),
            shards=(spec.shard_rows, *spec.shape[1:]),
            filters=(),
            compressors=[
                BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", blocksize=BLOCK_BYTES),
                Crc32cCodec(),
            ],
            dimension_names=spec.dimension_names,
        )
    checksums = {}
    for spec in specs:
        metadata = _object(memory, f"{spec.name}/zarr.json")
        folder.write(f"{spec.name}/zarr.json", metadata)
        checksums[spec.name] = crc32c(metadata)
    group.attrs.put(add_checksum({"decant": dict(about), "arrays": checksums}))
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
    if not ours or not has_valid_checksum(attributes):
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
