"""Check every object of a cache against its checksums, its marker and the corpus; and repair it.

The damaged parts are named, and only they need to be captured again: a damaged shard loses its
commit marker, and damaged metadata is rewritten from the fingerprint. Nothing here runs the
teacher, so a check runs at the speed of the disk. The gate (pipeline/verify) checks whether the
cache agrees with the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.io.address import Address
from pipeline.io.checked_json import DamagedError
from pipeline.io.folders import Folder, open_folder
from pipeline.io.zarr_groups import find_damaged_metadata, write_group
from pipeline.io.zarr_shards import encode_shard
from pipeline.logit_cache.codec import IdOrder
from pipeline.logit_cache.format import COMMITS, ID_ORDER, Fingerprint, marker_key
from pipeline.logit_cache.layout import (
    CacheLayout,
    committed_shards,
    id_order_name,
    load_id_order,
    load_layout,
    shards_with_marker,
)
from pipeline.logit_cache.reader import read_shard_arrays, require_corpus
from pipeline.runtime.console import progress

_WORKERS = 4


@dataclass(frozen=True)
class Damage:
    """A description of what is wrong; `shard` is None if the group itself is damaged."""

    shard: int | None
    what: str


@dataclass(frozen=True)
class CheckResult:
    """The result of a check."""

    shards: int  # in the complete cache; 0 if that cannot be known
    committed: int
    damages: tuple[Damage, ...]

    @property
    def missing(self) -> int:
        """Number of shards without a marker."""
        return self.shards - self.committed


def check_cache(address: Address, corpus: CorpusSplit) -> CheckResult:
    """Read every committed shard of a split, in parallel, and all metadata that describes them.

    Raises:
        MismatchError: the group is not a cache, has a newer format, or was made from another
            corpus.
    """
    where = address / corpus.split
    folder = open_folder(where)
    try:
        layout = load_layout(folder, str(where))
    except DamagedError as error:
        return CheckResult(0, 0, (Damage(None, str(error)),))
    if layout is None:
        return CheckResult(0, 0, (Damage(None, "it does not exist"),))
    require_corpus(layout.fingerprint, corpus, where)
    damages = [Damage(None, what) for what in _metadata_damages(folder, layout)]
    committed = shards_with_marker(folder, layout)
    damages += _shard_damages(folder, layout, corpus, committed)
    return CheckResult(layout.num_shards, len(committed), tuple(damages))


def repair_cache(
    address: Address,
    corpus: CorpusSplit,
    fingerprint: Fingerprint,
    *,
    chunk_rows: int,
    shard_rows: int,
    make_id_order: Callable[[], IdOrder],
) -> tuple[Damage, ...]:
    """Repair metadata, and uncommit damaged shards, which are then missing.

    Args:
        fingerprint: describes what the cache should hold; a cache made from anything else is
            refused.
        chunk_rows, shard_rows: used only if the cache's own values are lost.
        make_id_order: called if the id order is lost. If the new one differs (on another kind of
            machine), no shard can be decoded, and all shards are uncommitted.

    Returns:
        The damages found.

    Raises:
        MismatchError: the cache was made from something else; the message names it.
    """
    where = address / corpus.split
    folder = open_folder(where)
    damages: list[Damage] = []
    try:
        layout = load_layout(folder, str(where))
    except DamagedError as error:
        damages.append(Damage(None, str(error)))
        layout = CacheLayout(
            fingerprint=fingerprint, chunk_rows=chunk_rows, shard_rows=shard_rows, id_order=""
        )
        id_order = _surviving_id_order(folder, layout) or id_order_name(make_id_order())
        layout = replace(layout, id_order=id_order)
    if layout is None:
        return ()
    layout.fingerprint.require_equal(
        fingerprint, str(where), "run stages/prepare.py --overwrite to capture again"
    )
    if not damages:
        damages += [Damage(None, what) for what in _metadata_damages(folder, layout)]
    if damages:
        layout = _rewrite(folder, layout, make_id_order)
    committed = shards_with_marker(folder, layout)
    in_shards = _shard_damages(folder, layout, corpus, committed)
    for damage in in_shards:
        assert damage.shard is not None
        folder.remove(marker_key(damage.shard))
    return (*damages, *in_shards)


def _metadata_damages(folder: Folder, layout: CacheLayout) -> list[str]:
    found = find_damaged_metadata(folder, [*layout.specs.values(), layout.id_order_spec])
    try:
        load_id_order(folder, layout)
    except DamagedError as error:
        found.append(f"{layout.id_order}: {error}")
    return found


def _shard_damages(
    folder: Folder, layout: CacheLayout, corpus: CorpusSplit, committed: list[int]
) -> list[Damage]:
    def look(shard: int) -> Damage | None:
        try:
            read_shard_arrays(folder, layout, corpus, shard)
        except DamagedError as error:
            return Damage(shard, str(error))
        return None

    with ThreadPoolExecutor(_WORKERS) as pool:
        looks = pool.map(look, committed)
        what = f"check {corpus.split}"
        found = progress(looks, what=what, unit="shard", total=len(committed))
        return [damage for damage in found if damage is not None]


def _surviving_id_order(folder: Folder, lost: CacheLayout) -> str | None:
    """Return the name of an id order in the folder that has the contents its name promises.

    There may be several, if processes created the cache at the same time or another cache was
    there before. The order to which most markers refer belongs to the cache.
    """
    names = {key.partition("/")[0] for key in folder.sizes()}
    whole = []
    for name in sorted(n for n in names if n.startswith(ID_ORDER)):
        layout = replace(lost, id_order=name)
        with suppress(DamagedError):
            load_id_order(folder, layout)
            whole.append((len(committed_shards(folder, layout)), name))
    return max(whole)[1] if whole else None


def _rewrite(
    folder: Folder, layout: CacheLayout, make_id_order: Callable[[], IdOrder]
) -> CacheLayout:
    """Rewrite all metadata; shards survive only if the id order does."""
    try:
        id_order = load_id_order(folder, layout)
    except DamagedError:
        id_order = make_id_order()
        if id_order_name(id_order) != layout.id_order:
            folder.remove(COMMITS)
        layout = replace(layout, id_order=id_order_name(id_order))
        spec = layout.id_order_spec
        folder.write(spec.key_of(0), encode_shard(spec, id_order.ids))
    specs = [*layout.specs.values(), layout.id_order_spec]
    write_group(folder, specs, layout.about(), replace=True)
    return layout
