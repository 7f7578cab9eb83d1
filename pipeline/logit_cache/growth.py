"""Extend a cache to a corpus to which rows have been added since it was made.

The sha256 of a corpus is a chain over its rows, and the corpus lists it for every length that it
has had, so the cache of its first rows can be told from any other. Such a cache keeps its shards
and its id order; its metadata gets the number of rows and the sha256 of the longer corpus. The rows
that were added are then missing shards like any others. format.py says what becomes of the last
shard, if it is short.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.io.address import Address
from pipeline.io.checked_json import DamagedError
from pipeline.io.folders import Folder, open_folder
from pipeline.io.zarr_groups import write_group
from pipeline.logit_cache.codec import Arrays
from pipeline.logit_cache.format import SHORT, Fingerprint, marker_key
from pipeline.logit_cache.layout import CacheLayout, load_layout, read_marker
from pipeline.logit_cache.reader import holds_first_rows, read_shard_arrays


def is_beginning(made_from: Fingerprint, wanted: Fingerprint, corpus: CorpusSplit) -> bool:
    """Return whether a cache is the wanted one but for the rows that were added to the corpus."""
    grown = replace(made_from, num_rows=wanted.num_rows, corpus_sha256=wanted.corpus_sha256)
    return grown == wanted and holds_first_rows(made_from, corpus)


def extend_cache(address: Address, corpus: CorpusSplit, wanted: Fingerprint) -> int | None:
    """Extend the cache of the corpus's first rows, if that is what is there, by missing shards.

    Several processes may do so at once.

    Returns:
        The number of rows that it held; None if the cache is none, another one, or damaged.
    """
    where = address / corpus.split
    folder = open_folder(where)
    try:
        layout = load_layout(folder, str(where))
    except DamagedError:  # --repair rewrites what is damaged
        return None
    if layout is None or not is_beginning(layout.fingerprint, wanted, corpus):
        return None
    _set_short_shard_aside(folder, layout)
    longer = replace(layout, fingerprint=wanted)
    specs = [*longer.specs.values(), longer.id_order_spec]
    write_group(folder, specs, longer.about(), replace=True)
    return layout.fingerprint.num_rows


def _set_short_shard_aside(folder: Folder, layout: CacheLayout) -> None:
    shard = layout.num_shards - 1
    try:
        marker = read_marker(folder, shard)
    except DamagedError:
        return
    is_short = marker.rows[1] - marker.rows[0] < layout.shard_rows
    if is_short and layout.owns(marker, shard) and marker.rows == layout.rows_of(shard):
        folder.write(marker_key(shard, SHORT), folder.read(marker_key(shard)))
        folder.remove(marker_key(shard))


def short_shards(folder: Folder, layout: CacheLayout) -> dict[int, int]:
    """Return the end of the rows of each shard that was set aside and is not complete yet."""
    keys, found = folder.sizes(SHORT), {}
    for shard in range(layout.num_shards if keys else 0):
        if marker_key(shard, SHORT) in keys:
            try:
                marker = read_marker(folder, shard, SHORT)
            except DamagedError:
                continue
            start, stop = layout.rows_of(shard)
            if layout.owns(marker, shard) and start == marker.rows[0] < marker.rows[1] <= stop:
                found[shard] = marker.rows[1]
    return found


def read_short_shard(
    folder: Folder, layout: CacheLayout, corpus: CorpusSplit, shard: int, stop: int
) -> Arrays:
    """Read and check the decoded arrays of a shard that was set aside.

    Args:
        stop: the shard's last row + 1, as `short_shards` returns it.

    Raises:
        DamagedError: it is not what was committed, for example because it is being replaced.
    """
    as_it_was = replace(layout, fingerprint=replace(layout.fingerprint, num_rows=stop))
    return read_shard_arrays(folder, as_it_was, corpus, shard, SHORT)[1]
