"""The layout of a cache as objects: the arrays that follow from a fingerprint, and their group."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pipeline.errors import MismatchError
from pipeline.io.address import Address
from pipeline.io.checked_json import (
    DamagedError,
    Size,
    crc32c,
    has_valid_checksum,
    json_crc32c,
    parse,
)
from pipeline.io.folders import Folder, open_folder
from pipeline.io.hub_folder import remedy_for_damage
from pipeline.io.zarr_groups import read_group
from pipeline.io.zarr_shards import ArraySpec, read_shard
from pipeline.logit_cache.codec import IdOrder, count_dtype
from pipeline.logit_cache.format import (
    COMMITS,
    FORMAT_VERSION,
    ID_ORDER,
    SHORT,
    Fingerprint,
    Marker,
    marker_key,
)

_ARRAYS = (
    "num_kept",
    "id_indices",
    "logprob_deltas",
    "lse",
    "entropies",
    "num_distinct",
    "sampled_index_deltas",
    "sampled_counts",
    "sampled_logprobs",
)
_MARKERS_AT_ONCE = 16  # requests to an object store
_MAX_CHUNK = 2**31 - 1  # bytes that blosc compresses at once


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """The layout of a cache with a given fingerprint, as arrays, chunks and shards."""

    fingerprint: Fingerprint
    chunk_rows: Size
    shard_rows: Size
    id_order: Annotated[str, Field(pattern=f"^{ID_ORDER}[0-9a-f]{{8}}$")]  # id_order's name

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """The arrays of rows, by name."""
        made_from = self.fingerprint
        k, most = made_from.k, made_from.num_sampled
        index = "uint16" if made_from.vocab_size <= 65_536 else "uint32"
        arrays = {
            "lse": self._by_position("float16"),
            "entropies": self._by_position("uint16", 1 + len(made_from.temperatures)),
        }
        if k:
            arrays["num_kept"] = self._by_position(count_dtype(k))
            arrays["id_indices"] = self._ragged(index, k)
            arrays["logprob_deltas"] = self._ragged("uint16", k)
        if most:
            arrays["num_distinct"] = self._by_position(count_dtype(most))
            arrays["sampled_index_deltas"] = self._ragged(index, most)
            arrays["sampled_counts"] = self._ragged(count_dtype(most), most)
            if made_from.temperatures:
                arrays["sampled_logprobs"] = self._ragged("float16", most)
        return {name: replace(spec, name=name) for name, spec in arrays.items()}

    def _by_position(self, dtype: str, *last: int) -> ArraySpec:
        """Describe an array [N, L, ...]."""
        return ArraySpec(
            name="",
            shape=(self.fingerprint.num_rows, self.fingerprint.row_length, *last),
            dtype=dtype,
            chunk_rows=self.chunk_rows,
            shard_rows=self.shard_rows,
            dimension_names=("row", "position", *("entropy" for _ in last)),
        )

    def _ragged(self, dtype: str, most: int) -> ArraySpec:
        """Describe a ragged array of up to `most` values per position."""
        rows, length = self.fingerprint.num_rows, self.fingerprint.row_length
        return ArraySpec(
            name="",
            shape=(-(-rows // self.chunk_rows), self.chunk_rows * length * most),
            dtype=dtype,
            chunk_rows=1,
            shard_rows=self.shard_rows // self.chunk_rows,
            dimension_names=("chunk", "value"),
        )

    @property
    def id_order_spec(self) -> ArraySpec:
        """The array id_order."""
        size = self.fingerprint.vocab_size
        return ArraySpec(
            name=self.id_order,
            shape=(size,),
            dtype="uint32",
            chunk_rows=size,
            shard_rows=size,
            dimension_names=("index",),
        )

    @property
    def num_shards(self) -> int:
        """Number of shards in the complete cache."""
        return self.specs["lse"].num_shards

    def rows_of(self, shard: int) -> tuple[int, int]:
        """Return a shard's first row, and the row after its last one."""
        return self.specs["lse"].rows_of(shard)

    def about(self) -> dict[str, Any]:
        """Return the description that is stored in the group's attributes."""
        return asdict(self.fingerprint) | {
            "chunk_rows": self.chunk_rows,
            "shard_rows": self.shard_rows,
            "id_order": self.id_order,
        }

    def checksum(self) -> int:
        """Return the crc32c of `about` without what changes when the corpus grows.

        A shard's marker holds it to identify the cache.
        """
        grows = ("num_rows", "corpus_sha256")
        return json_crc32c({name: v for name, v in self.about().items() if name not in grows})

    def sha256(self) -> str:
        """Return the sha256 of `about`, by which a measurement says on which cache it was made."""
        text = json.dumps(self.about(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def owns(self, marker: Marker, shard: int) -> bool:
        """Return whether a marker is that of a shard of this cache, of however many rows."""
        return marker.shard == shard and marker.cache == self.checksum()


def load_layout(folder: Folder, where: str) -> CacheLayout | None:
    """Read the layout of the cache in a folder; None if there is no cache.

    Raises:
        MismatchError: the group is not a cache, or has a newer format.
        DamagedError: the metadata is not what was written.
    """
    about = read_group(folder, where, FORMAT_VERSION)
    if about is None:
        return None
    try:
        fingerprint = Fingerprint.from_json(about)
        names = ("chunk_rows", "shard_rows", "id_order")
        values = {name: about[name] for name in names} | {"fingerprint": asdict(fingerprint)}
        layout = parse(CacheLayout, values, "its zarr.json")
    except KeyError as error:
        raise MismatchError(
            f"{where} is not a logit cache, it lacks {error}: choose another paths.logits"
        ) from None
    _require_possible(layout)
    return layout


def _require_possible(layout: CacheLayout) -> None:
    """Refuse sizes that no cache has, before memory is allocated for them.

    Raises:
        DamagedError: a size is impossible; the message names it.
    """
    if layout.shard_rows % layout.chunk_rows:
        raise DamagedError(
            f"its zarr.json has shards of {layout.shard_rows} rows in chunks of {layout.chunk_rows}"
        )
    for spec in (*layout.specs.values(), layout.id_order_spec):
        if spec.chunk_bytes > _MAX_CHUNK:
            raise DamagedError(
                f"its zarr.json has chunks of {spec.chunk_bytes} bytes in {spec.name}"
            )


def load_id_order(folder: Folder, layout: CacheLayout) -> IdOrder:
    """Read the id order of a cache.

    Raises:
        DamagedError: it is missing, or its contents do not match its name.
    """
    ids = read_shard(folder, layout.id_order_spec, 0)
    if not np.array_equal(np.sort(ids), np.arange(len(ids))):
        raise DamagedError(f"{layout.id_order} is not a permutation of the ids")
    id_order = IdOrder(ids)
    if id_order_name(id_order) != layout.id_order:
        raise DamagedError(f"{layout.id_order} holds other ids")
    return id_order


def remove_cache(folder: Folder) -> None:
    """Delete a split's cache, of any K and M, and nothing else in the folder.

    Commit markers are removed first, so that an interrupted removal leaves no shard committed.
    """
    folder.remove(COMMITS)
    folder.remove(SHORT)
    folder.remove("zarr.json")
    for name in {key.partition("/")[0] for key in folder.sizes()}:
        if name in _ARRAYS or name.startswith(ID_ORDER):
            folder.remove(name)


@contextmanager
def damage_as_sentence(address: Address, shard: int | None = None) -> Iterator[None]:
    """Turn DamagedError into MismatchError with the remedy.

    Args:
        address: the split's cache.
        shard: the damaged shard; None if it is the cache itself.
    """
    try:
        yield
    except DamagedError as error:
        what = address if shard is None else f"shard {shard} of {address}"
        how = remedy_for_damage(address, repair_command(address))
        raise MismatchError(f"{what} is damaged ({error}): {how}") from None


def repair_command(address: Address) -> str:
    """Return the command that repairs a split's cache, of the stage that made it."""
    repair, convert = "run stages/prepare.py --repair", "run stages/convert.py --overwrite"
    try:
        layout = load_layout(open_folder(address), str(address))
    except (DamagedError, MismatchError):  # what says how it was made cannot be read
        return f"{repair}, or {convert} if it was imported"
    return convert if layout and layout.fingerprint.imported_from else repair


def id_order_name(id_order: IdOrder) -> str:
    """Return the array's name: `id_order_` and the crc32c of the ids' bytes."""
    return f"{ID_ORDER}{crc32c(id_order.to_bytes()):08x}"


def read_marker(folder: Folder, shard: int, under: str = COMMITS) -> Marker:
    """Read a shard's commit marker.

    Args:
        under: `COMMITS`, or `SHORT` for the marker of a shard that is to get more rows.

    Raises:
        DamagedError: the marker is missing or not what was written.
    """
    try:
        values = json.loads(folder.read(marker_key(shard, under)))
    except FileNotFoundError:
        raise DamagedError("its commit marker is missing") from None
    except (ValueError, RecursionError):
        raise DamagedError("its commit marker cannot be read") from None
    if not isinstance(values, dict) or not has_valid_checksum(values):
        raise DamagedError("its commit marker does not match its crc32c")
    return parse(Marker, values, "its commit marker")


def shards_with_marker(folder: Folder, layout: CacheLayout) -> list[int]:
    """List the shards that have a marker, whatever its contents, from one listing, in order."""
    markers = folder.sizes(COMMITS)
    return [shard for shard in range(layout.num_shards) if marker_key(shard) in markers]


def committed_shards(folder: Folder, layout: CacheLayout) -> list[int]:
    """List the shards with an intact marker of THIS cache, in order.

    Another cache that was in the same place may have left markers behind.
    """
    with ThreadPoolExecutor(_MARKERS_AT_ONCE) as pool:
        marked = shards_with_marker(folder, layout)
        ours = pool.map(lambda shard: is_committed(folder, layout, shard), marked)
        return [shard for shard, is_ours in zip(marked, ours, strict=True) if is_ours]


def is_committed(folder: Folder, layout: CacheLayout, shard: int) -> bool:
    """Return whether a shard has an intact marker of this cache."""
    try:
        marker = read_marker(folder, shard)
    except DamagedError:
        return False
    return layout.owns(marker, shard) and marker.rows == layout.rows_of(shard)
