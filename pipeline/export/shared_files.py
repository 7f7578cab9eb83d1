"""What is published of a corpus and its cache, by its path in the dataset repository.

corpus.zarr/  the corpus; its shards as they are
logits.zarr/  the cache; likewise
tokenizer/    the teacher's tokenizer, which made the corpus's ids

Of a folder only the files are taken that the format names. So neither `source.json`, which names
files of this machine, nor anything that someone else put there is published.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.params import Paths
from pipeline.data.corpus_zarr import (
    SPLITS,
    CorpusSplit,
    objects_key,
    remedy_for_damaged_corpus,
    split_specs,
)
from pipeline.errors import MismatchError
from pipeline.io.address import HUB_FOLDERS
from pipeline.io.folders import Folder, open_folder
from pipeline.io.hub_folder import remedy_for_damage
from pipeline.io.ownership import MARK
from pipeline.io.zarr_groups import find_damaged_metadata
from pipeline.io.zarr_shards import ArraySpec
from pipeline.logit_cache.format import marker_key
from pipeline.logit_cache.integrity import check_cache
from pipeline.logit_cache.layout import repair_command
from pipeline.logit_cache.reader import CacheReader
from pipeline.model.folder import TOKENIZER_FILES, files_to_copy

TOKENIZER = "tokenizer"
GROUPS = tuple(f"{tree}/{split}/zarr.json" for tree in HUB_FOLDERS.values() for split in SPLITS)
"""The files without which a split does not exist, whatever else is there."""


@dataclass(frozen=True)
class SharedFile:
    """A file to publish, wherever it is stored."""

    folder: Folder
    key: str
    size: int

    def read(self) -> bytes:
        """Return the file's contents."""
        return self.folder.read(self.key)


def open_whole(paths: Paths) -> list[CacheReader]:
    """Open corpus and cache of all splits, after reading everything against its checksums.

    Raises:
        DecantError: a split is absent, incomplete or damaged; the message names the first damage.
    """
    readers = []
    for split in SPLITS:
        rows = CorpusSplit(paths.corpus, split)
        found = find_damaged_metadata(open_folder(rows.path / split), _specs_of(rows))
        if found:
            how = remedy_for_damaged_corpus(rows.path, split)
            raise MismatchError(f"{rows.path / split} is damaged ({found[0]}): {how}")
        for _ in rows.digests():
            pass
        reader = CacheReader(paths.logits, rows)
        if damages := check_cache(paths.logits, rows).damages:
            shard = "" if damages[0].shard is None else f"shard {damages[0].shard}: "
            how = remedy_for_damage(reader.address, repair_command(reader.address))
            raise MismatchError(
                f"{reader.address} has {len(damages):,} damaged parts, the first is {shard}"
                f"{damages[0].what}: {how}"
            )
        readers.append(reader)
    return readers


def shared_files(
    paths: Paths, readers: Iterable[CacheReader], tokenizer: Path | None
) -> dict[str, SharedFile]:
    """Return the files of corpus and cache by their paths, and of the tokenizer if there is one.

    Args:
        readers: the cache of each split.
        tokenizer: a folder with the tokenizer that made the corpus.
    """
    keys: dict[str, list[str]] = {name: [] for name in HUB_FOLDERS}
    for reader in readers:
        split = reader.corpus.split
        keys["corpus"] += [f"{split}/{key}" for key in _corpus_keys(reader.corpus)]
        keys["logits"] += [f"{split}/{key}" for key in _cache_keys(reader)]
    found = {}
    for name, wanted in keys.items():
        folder = open_folder(getattr(paths, name))
        sizes = folder.sizes()
        for key in wanted + [root for root in (MARK, "zarr.json") if root in sizes]:
            found[f"{HUB_FOLDERS[name]}/{key}"] = SharedFile(folder, key, sizes[key])
    if tokenizer is not None:
        folder = open_folder(tokenizer)
        for file in files_to_copy(tokenizer, TOKENIZER_FILES):
            found[f"{TOKENIZER}/{file.name}"] = SharedFile(folder, file.name, file.stat().st_size)
    return found


def _specs_of(corpus: CorpusSplit) -> list[ArraySpec]:
    return list(split_specs(corpus.info).values())


def _corpus_keys(corpus: CorpusSplit) -> Iterator[str]:
    yield "zarr.json"
    yield objects_key(corpus.info.objects)
    yield from _array_keys(_specs_of(corpus))


def _cache_keys(reader: CacheReader) -> Iterator[str]:
    layout = reader.layout
    yield "zarr.json"
    yield from map(marker_key, range(layout.num_shards))
    yield from _array_keys([layout.id_order_spec, *layout.specs.values()])


def _array_keys(specs: Iterable[ArraySpec]) -> Iterator[str]:
    for spec in specs:
        yield f"{spec.name}/zarr.json"
        yield from map(spec.key_of, range(spec.num_shards))
