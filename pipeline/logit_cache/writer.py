"""Write a cache in whole shards, each of which is made durable and then committed by a marker.

The order makes it crash-safe: first all objects of the shard are written durably, then the marker.
If the process is killed at any time before the marker's rename, the shard does not exist and is
written again. Several writers, on one machine or many, may fill one cache as long as no two write
the same shard.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.errors import MismatchError
from pipeline.io.address import Address
from pipeline.io.checked_json import DamagedError, add_checksum
from pipeline.io.folders import open_folder
from pipeline.io.ownership import claim
from pipeline.io.zarr_groups import write_group
from pipeline.io.zarr_shards import encode_shard, entry_of
from pipeline.logit_cache.codec import IdOrder, encode, to_topk
from pipeline.logit_cache.format import SHORT, Fingerprint, Marker, marker_key
from pipeline.logit_cache.growth import read_short_shard, short_shards
from pipeline.logit_cache.layout import (
    CacheLayout,
    committed_shards,
    damage_as_sentence,
    id_order_name,
    is_committed,
    load_id_order,
    load_layout,
)
from pipeline.targets.topk import TopK


def has_cache(address: Address, split: str) -> bool:
    """Return whether there is a cache of the split, complete or not.

    Raises:
        MismatchError: what is there is damaged, or not a logit cache.
    """
    where = address / split
    with damage_as_sentence(where):
        return load_layout(open_folder(where), str(where)) is not None


def create_cache(
    address: Address,
    split: str,
    fingerprint: Fingerprint,
    *,
    chunk_rows: int,
    shard_rows: int,
    id_order: IdOrder,
) -> None:
    """Create the cache of a split, without shards.

    Processes may create the same cache at once, even with different id orders: the array of an
    order is named by its content, and the last process to write the group decides which one holds.

    Args:
        address: the cache, for example cache/logits.zarr, which will contain the split's group.
        chunk_rows: unit of compression.
        shard_rows: unit of writing and reading.
    """
    claim(address, "logits", key="paths.logits")
    layout = CacheLayout(
        fingerprint=fingerprint,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
        id_order=id_order_name(id_order),
    )
    folder, spec = open_folder(address / split), layout.id_order_spec
    folder.write(spec.key_of(0), encode_shard(spec, id_order.ids))
    write_group(open_folder(address), [], {})
    write_group(folder, [*layout.specs.values(), spec], layout.about())


class CacheWriter:
    """The existing cache of one split, to be filled shard by shard.

    Args:
        address: the cache, for example cache/logits.zarr, which contains the split's group.

    Raises:
        MismatchError: the cache is missing or was made from something else; the message names it.
    """

    def __init__(self, address: Address, split: str, fingerprint: Fingerprint) -> None:
        self.address = address / split
        where = str(self.address)
        self._folder = open_folder(self.address)
        with damage_as_sentence(self.address):
            layout = load_layout(self._folder, where)
            if layout is None:
                raise MismatchError(f"{where} does not exist: run stages/prepare.py")
            layout.fingerprint.require_equal(
                fingerprint,
                where,
                "remove it, or run stages/prepare.py --overwrite to capture again",
            )
            self._id_order = load_id_order(self._folder, layout)
        self.layout = layout
        self._short = short_shards(self._folder, layout)

    def short_rows(self, shard: int) -> int:
        """Return how many rows of a missing shard were captured before the cache was extended."""
        return self._short[shard] - self.layout.rows_of(shard)[0] if shard in self._short else 0

    def read_short(self, shard: int, corpus: CorpusSplit) -> TopK | None:
        """Return the targets of these rows; None if there are none, or if they are damaged."""
        if shard not in self._short:
            return None
        try:
            stop = self._short[shard]
            arrays = read_short_shard(self._folder, self.layout, corpus, shard, stop)
        except DamagedError:
            return None
        return to_topk(arrays, self._id_order, self.layout.fingerprint)

    def missing(self) -> list[int]:
        """List the shards that have no marker of this cache yet, in order."""
        committed = set(committed_shards(self._folder, self.layout))
        return [shard for shard in range(self.layout.num_shards) if shard not in committed]

    def is_committed(self, shard: int) -> bool:
        """Return whether a shard has its marker."""
        return is_committed(self._folder, self.layout, shard)

    def write(self, shard: int, topk: TopK, tokens_sha256: str) -> None:
        """Write one whole shard [rows, L, ...] and commit it.

        Safe to call from a thread, but not twice for the same shard at the same time.
        """
        start, stop = self.layout.rows_of(shard)
        assert len(topk.lse) == stop - start
        arrays = encode(topk, self._id_order, self.layout.fingerprint, self.layout.chunk_rows)
        objects = {}
        for name, spec in self.layout.specs.items():
            data = encode_shard(spec, arrays[name])
            self._folder.write(spec.key_of(shard), data)
            objects[name] = entry_of(spec.key_of(shard), data)
        marker = Marker(
            shard=shard,
            rows=(start, stop),
            cache=self.layout.checksum(),
            tokens_sha256=tokens_sha256,
            objects=objects,
        )
        values = asdict(marker)
        del values["crc32c"]
        self._folder.write(marker_key(shard), json.dumps(add_checksum(values)).encode())
        if self._short.pop(shard, None):
            self._folder.remove(marker_key(shard, SHORT))

    def drop(self, shard: int) -> None:
        """Uncommit a shard, which is then missing."""
        self._folder.remove(marker_key(shard))
