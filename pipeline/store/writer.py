"""Write a cache in whole shards, each made durable and then committed by a marker.

The order is what makes it crash-safe: data files, fsync, marker file, fsync, rename, fsync of the
folder. Killed anywhere before the rename, the shard does not exist and is written again.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import zarr

from pipeline.errors import MismatchError
from pipeline.files import fsync, write_json
from pipeline.store.codec import Arrays
from pipeline.store.schema import (
    ARRAYS,
    COMMITS,
    Fingerprint,
    array_layout,
    num_shards,
)

_OVERWRITE = "remove it, or run stages/prepare.py --overwrite to capture again"


class CacheWriter:
    """The cache of one split, created when absent, continued when its fingerprint is the same.

    Args:
        path: the split's group, for example cache/logits.zarr/train.
        shard_rows: unit of writing; chunk_rows: unit of reading. An existing cache keeps its own.

    Raises:
        MismatchError: the cache at `path` was made from something else, which is named.
    """

    def __init__(
        self, path: Path, fingerprint: Fingerprint, *, chunk_rows: int, shard_rows: int
    ) -> None:
        self.path = path
        self.fingerprint = fingerprint
        layout = {"chunk_rows": chunk_rows, "shard_rows": shard_rows}
        if not path.exists():
            _create(path, fingerprint, layout)
        attributes = read_attributes(path)
        Fingerprint.from_json(attributes, str(path)).require_equal(
            fingerprint, str(path), _OVERWRITE
        )
        self.shard_rows: int = attributes["shard_rows"]
        group = zarr.open_group(path, mode="r+")
        self._arrays: dict[str, Any] = {name: group[name] for name in ARRAYS}

    @property
    def num_shards(self) -> int:
        """Shards of the complete cache."""
        return num_shards(self.fingerprint.num_rows, self.shard_rows)

    def rows_of(self, shard: int) -> tuple[int, int]:
        """First row and end of a shard."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.fingerprint.num_rows)

    def missing(self) -> list[int]:
        """Shards that have no marker yet, in order."""
        return [i for i in range(self.num_shards) if not marker_path(self.path, i).exists()]

    def write(self, shard: int, arrays: Arrays, tokens_sha256: str) -> None:
        """Write one whole shard and commit it. Not to be called for one shard from two places."""
        start, stop = self.rows_of(shard)
        files = {name: shard_path(self.path, name, shard, a.ndim) for name, a in arrays.items()}
        # An all-zero chunk must be written too, else it can not be told from a lost one.
        with zarr.config.set({"array.write_empty_chunks": True}):
            for name, values in arrays.items():
                assert len(values) == stop - start
                self._arrays[name][start:stop] = values
        for file in files.values():
            fsync(file)
            fsync(file.parent)
        marker = {
            "shard": shard,
            "rows": [start, stop],
            "tokens_sha256": tokens_sha256,
            "sizes": {name: file.stat().st_size for name, file in files.items()},
        }
        write_json(marker_path(self.path, shard), marker)


def marker_path(path: Path, shard: int) -> Path:
    """Where the commit marker of a shard lies."""
    return path / COMMITS / f"{shard:06d}.json"


def shard_path(path: Path, array: str, shard: int, ndim: int) -> Path:
    """Where zarr puts one shard of one array: `<array>/c/<shard>/0/0`."""
    return path.joinpath(array, "c", str(shard), *["0"] * (ndim - 1))


def read_attributes(path: Path) -> dict[str, Any]:
    """The group's "decant" attributes.

    Raises:
        MismatchError: the folder is not a cache.
    """
    try:
        attributes: Any = dict(zarr.open_group(path, mode="r").attrs)["decant"]
    except (OSError, ValueError, KeyError):
        raise MismatchError(f"{path} is not a logit cache: {_OVERWRITE}") from None
    assert isinstance(attributes, dict)
    return attributes


def _create(path: Path, fingerprint: Fingerprint, layout: dict[str, int]) -> None:
    """A new, empty cache, made beside its place and renamed: never half-made under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    zarr.open_group(path.parent, mode="a")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    group = zarr.open_group(partial, mode="w")
    for name, options in array_layout(fingerprint, **layout).items():
        group.create_array(name, **options)
    group.create_group(COMMITS)
    group.attrs["decant"] = asdict(fingerprint) | layout
    partial.rename(path)
    fsync(path.parent)
