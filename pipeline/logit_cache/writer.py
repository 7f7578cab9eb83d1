"""Write a cache in whole shards, each of which is made durable and then committed by a marker.

The order makes it crash-safe: first all objects of the shard are written durably, then the marker.
If the process is killed at any time before the marker's rename, the shard does not exist and is
written again. Several writers, on one machine or many, may fill one cache as long as no two write
the same shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

from pipeline.io.checked_json import add_checksum
from pipeline.io.object_store import Address, claim, open_folder
from pipeline.io.zarr_groups import write_group
from pipeline.io.zarr_shards import encode_shard, object_hash
from pipeline.logit_cache.codec import RankTable, encode
from pipeline.logit_cache.format import Fingerprint, Marker, marker_key
from pipeline.logit_cache.layout import (
    CacheLayout,
    committed_shards,
    damage_as_sentence,
    is_committed,
    load_layout,
    load_table,
    rank_table_name,
)
from pipeline.targets.topk import TopK


class CacheWriter:
    """The cache of one split; it is created if missing, or continued if its fingerprint is equal.

    Args:
        address: the cache, for example cache/logits.zarr, which contains the split's group.
        chunk_rows: unit of compression. An existing cache keeps its own.
        shard_rows: unit of writing and reading. An existing cache keeps its own.
        count: makes the rank table of a new cache.

    Raises:
        MismatchError: the cache at `address` was made from something else; the message names it.
    """

    def __init__(
        self,
        address: Address,
        split: str,
        fingerprint: Fingerprint,
        *,
        chunk_rows: int,
        shard_rows: int,
        count: Callable[[], RankTable],
    ) -> None:
        self.address = address / split
        self._folder = open_folder(self.address)
        with damage_as_sentence(str(self.address)):
            self.layout, self._table = self._open_or_create(
                address, fingerprint, chunk_rows, shard_rows, count
            )

    def _open_or_create(
        self,
        address: Address,
        fingerprint: Fingerprint,
        chunk_rows: int,
        shard_rows: int,
        count: Callable[[], RankTable],
    ) -> tuple[CacheLayout, RankTable]:
        where = str(self.address)
        if load_layout(self._folder, where) is None:
            claim(address, "logits", key="paths.logits")
            table = count()
            layout = CacheLayout(
                fingerprint=fingerprint,
                chunk_rows=chunk_rows,
                shard_rows=shard_rows,
                rank_table=rank_table_name(table),
            )
            # Named by its content, so that processes creating the cache at once do not mix tables.
            spec = layout.rank_spec
            self._folder.write(spec.key_of(0), encode_shard(spec, table.rank_to_id))
            specs = [*layout.specs.values(), spec]
            write_group(open_folder(address), [], {})
            write_group(self._folder, specs, layout.about())
        found = load_layout(self._folder, where)
        assert found is not None
        found.fingerprint.require_equal(
            fingerprint, where, "remove it, or run stages/prepare.py --overwrite to capture again"
        )
        return found, load_table(self._folder, found)

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
        arrays = encode(topk, self._table)
        objects = {}
        for name, spec in self.layout.specs.items():
            assert len(arrays[name]) == stop - start
            data = encode_shard(spec, arrays[name])
            self._folder.write(spec.key_of(shard), data)
            objects[name] = (len(data), object_hash(spec.key_of(shard), data))
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

    def drop(self, shard: int) -> None:
        """Uncommit a shard, which is then missing."""
        self._folder.remove(marker_key(shard))
