"""Our shards and zarr's are the same format: each reads what the other wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import MismatchError
from pipeline.io.checked_json import DamagedError, crc32c
from pipeline.io.folders import LocalFolder
from pipeline.io.zarr_groups import find_damaged_metadata, read_group, write_group
from pipeline.io.zarr_shards import ArraySpec, decode_shard, encode_shard, object_hash, read_shard


def spec_of(name: str = "a", **changes: Any) -> ArraySpec:
    values: dict[str, Any] = {
        "name": name,
        "shape": (21, 5, 6),
        "dtype": "uint16",
        "chunk_rows": 4,
        "shard_rows": 8,
    }
    return ArraySpec(**(values | changes))


def values_of(spec: ArraySpec, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 2**16, spec.shape).astype(spec.dtype)


SPECS = [
    spec_of(),
    spec_of(shape=(6, 30), chunk_rows=1, shard_rows=2, dimension_names=("chunk", "value")),
    spec_of(shape=(21, 5), dtype="float32"),
    spec_of(shape=(16, 3, 2), dtype="uint32", chunk_rows=8),
    spec_of(shape=(1, 7), dtype="float16", chunk_rows=1, shard_rows=1),
    spec_of(shape=(500,), dtype="uint32", chunk_rows=500, shard_rows=500),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zarr_reads_what_we_write(spec: ArraySpec, tmp_path: Path) -> None:
    values, folder = values_of(spec), LocalFolder(tmp_path)
    write_group(folder, [spec], {"format_version": 1})
    for shard in range(spec.num_shards):
        start, stop = spec.rows_of(shard)
        folder.write(spec.key_of(shard), encode_shard(spec, values[start:stop]))
        assert np.array_equal(read_shard(folder, spec, shard), values[start:stop])
    assert np.array_equal(np.asarray(zarr.open_group(tmp_path, mode="r")["a"][:]), values)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_we_read_what_zarr_writes(spec: ArraySpec, tmp_path: Path) -> None:
    values, folder = values_of(spec), LocalFolder(tmp_path)
    write_group(folder, [spec], {"format_version": 1})
    zarr.open_group(tmp_path, mode="r+")["a"][:] = values
    for shard in range(spec.num_shards):
        start, stop = spec.rows_of(shard)
        assert np.array_equal(read_shard(folder, spec, shard), values[start:stop])


@given(place=st.integers(0), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(place: int, bit: int) -> None:
    spec = spec_of()
    good = encode_shard(spec, values_of(spec)[:8])
    damaged = bytearray(good)
    damaged[place % len(good)] ^= 1 << bit
    with pytest.raises(DamagedError):
        decode_shard(spec, bytes(damaged), 0)


@given(length=st.integers(0, 400))
def test_any_truncation_is_found(length: int) -> None:
    spec = spec_of()
    good = encode_shard(spec, values_of(spec)[:8])
    with pytest.raises(DamagedError):
        decode_shard(spec, good[: min(length, len(good) - 1)], 0)


def test_crc32c_of_the_standard() -> None:
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


def test_one_of_two_creators_wins_unless_asked_to_replace(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    write_group(folder, [spec_of()], {"format_version": 1, "who": "first"})
    write_group(folder, [spec_of()], {"format_version": 1, "who": "second"})
    assert read_group(folder, "here", 1) == {"format_version": 1, "who": "first"}
    write_group(folder, [spec_of()], {"format_version": 1, "who": "third"}, replace=True)
    assert read_group(folder, "here", 1) == {"format_version": 1, "who": "third"}


def test_what_a_group_says_is_checked(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    assert read_group(folder, "here", 1) is None
    write_group(folder, [spec_of()], {"format_version": 1, "k": 64})
    good = folder.read("zarr.json")
    with pytest.raises(MismatchError, match="here has format version 1, this program reads 2"):
        read_group(folder, "here", 2)
    folder.write("zarr.json", good.replace(b"64", b"65"))
    with pytest.raises(DamagedError, match="crc32c"):
        read_group(folder, "here", 1)
    folder.write("zarr.json", good[:-9])
    with pytest.raises(DamagedError, match="cannot be read"):
        read_group(folder, "here", 1)
    folder.write("zarr.json", b'{"attributes": {}, "zarr_format": 3, "node_type": "group"}')
    with pytest.raises(MismatchError, match="here was not written by Decant"):
        read_group(folder, "here", 1)


def test_damaged_metadata_is_named(tmp_path: Path) -> None:
    folder, spec = LocalFolder(tmp_path), spec_of()
    write_group(folder, [spec, spec_of("b")], {})
    assert find_damaged_metadata(folder, [spec, spec_of("b")]) == []
    folder.write("a/zarr.json", folder.read("a/zarr.json").replace(b"uint16", b"uint32"))
    folder.remove("b/zarr.json")
    assert find_damaged_metadata(folder, [spec, spec_of("b")]) == [
        "a/zarr.json does not match its crc32c",
        "b/zarr.json is missing",
    ]


def test_the_hash_of_an_object_tells_shards_of_one_length_apart() -> None:
    """Their crc32c does not: chunks and index end with their own, so lengths alone decide it."""
    spec = ArraySpec(name="a", shape=(64, 512), dtype="uint16", chunk_rows=8, shard_rows=32)
    generator = np.random.default_rng(0)
    one, two = (
        encode_shard(spec, generator.integers(0, 2**16, (32, 512), dtype=np.uint16))
        for _ in range(2)
    )
    assert len(one) == len(two)
    assert one != two
    assert crc32c(one) == crc32c(two)
    assert object_hash(spec.key_of(0), one) != object_hash(spec.key_of(0), two)
    assert object_hash(spec.key_of(0), one) != object_hash(spec.key_of(1), one)  # in its place
    assert object_hash("", b"") == "99aa06d3014798d86001c324468d497f"  # xxh3's own test vector
