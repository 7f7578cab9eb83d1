"""Write a split of the corpus, or add rows to one.

The order of the writes makes both crash-safe (pipeline/data/corpus_zarr.py says why). A new split
exists once its group's zarr.json is written. An append

1. writes the new shards that lie after the last one, which no reader looks at yet;
2. lists the size and hash of the last shard's longer successor as an alternative, and replaces the
   group's zarr.json by one that differs only in that;
3. replaces the last, short shard of each array by its successor;
4. writes the new list of objects, then replaces the group's zarr.json, which commits the new rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.corpus_zarr import (
    DIGEST_BYTES,
    DIGESTS,
    FORMAT_VERSION,
    NO_ROWS,
    OBJECTS,
    CorpusSplit,
    Objects,
    SplitInfo,
    chain_rows,
    digests_spec,
    objects_key,
    read_info,
    row_specs,
    split_specs,
)
from pipeline.data.packing import PADDING, Rows
from pipeline.errors import DecantError
from pipeline.io.address import Address
from pipeline.io.folders import Folder, open_folder
from pipeline.io.ownership import claim
from pipeline.io.zarr_groups import write_group
from pipeline.io.zarr_shards import ArraySpec, Entry, encode_shard, entry_of


class SplitWriter:
    """A writer of blocks of rows to a split, which exists once `commit` has been called.

    Args:
        address: address of the corpus; an existing split there is removed only when the first rows
            of the new one arrive, so nothing is lost if the source cannot be read.
        key: the parameter that holds the address, for errors.
        onto: the split at this address to which rows are added; None writes a new one.

    Raises:
        MismatchError: something else is there, for example a logit cache or the user's own text.
        DecantError: the split that rows are added to is damaged.
    """

    def __init__(
        self,
        address: Address,
        split: str,
        *,
        row_length: int,
        vocab_size: int,
        onto: CorpusSplit | None = None,
        key: str = "paths.corpus",
    ) -> None:
        self._root = open_folder(address)
        self._where = str(address / split)
        self._folder = open_folder(address / split)
        claim(address, "corpus", key=key)
        self._row_length = row_length
        self._onto = onto
        self._digests: list[bytes] = []
        self.num_new_rows = 0
        specs = row_specs(1, row_length, vocab_size), {DIGESTS: digests_spec(1)}
        if onto is None:
            self._used = np.zeros(vocab_size, dtype=bool)
            self._sha256 = NO_ROWS
            self._num_tokens = self._num_documents = self._num_in_loss = 0
            self._arrays = [_GrowingArrays(self._folder, group) for group in specs]
            return
        info, short = onto.info, onto.short_shards()
        packed = np.frombuffer(bytes.fromhex(onto.objects.used_ids), np.uint8)
        self._used = np.unpackbits(packed, count=vocab_size, bitorder="little").astype(bool)
        self._sha256 = info.sha256
        self._num_tokens = info.num_tokens
        self._num_documents = info.num_documents
        self._num_in_loss = info.num_in_loss
        self._arrays = [
            _GrowingArrays(
                self._folder, group, length=length, shards=onto.objects.shards, short=short
            )
            for group, length in zip(specs, (info.num_rows, info.num_digests), strict=True)
        ]

    def saw(self, digest: bytes) -> None:
        """Remember a document that is taken, or left out because it has no target."""
        self._digests.append(digest)

    def add(self, rows: Rows) -> None:
        """Append at least one row; full shards are written immediately.

        Documents are numbered from 0 in each writer, and stored with the numbers that follow those
        of the split to which they are added.
        """
        if self._onto is None and not self.num_new_rows:
            # zarr.json is removed first: without it the split does not exist.
            names = [name for arrays in self._arrays for name in arrays.specs]
            for name in ("zarr.json", OBJECTS, *names):
                self._folder.remove(name)
        real = rows.doc_ids != PADDING
        first = self._onto.info.num_documents if self._onto else 0
        rows = replace(rows, doc_ids=np.where(real, rows.doc_ids + np.int32(first), PADDING))
        self._sha256 = chain_rows(rows, self._sha256)
        self._used[rows.tokens[real]] = True
        self._num_tokens += int(real.sum())
        self._num_in_loss += int(rows.in_loss.sum())
        self._num_documents = max(self._num_documents, int(rows.doc_ids.max()) + 1)
        self.num_new_rows += len(rows)
        self._arrays[0].add(vars(rows))
        self._add_digests()

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far, without padding."""
        return self._num_tokens

    def commit(
        self,
        *,
        num_text_bytes: int,
        tokenizer_sha256: str,
        num_dropped: int = 0,
        leading_ids: tuple[int, ...] = (),
    ) -> SplitInfo:
        """Write the pending rows, and the metadata that makes the split, or the new rows, exist.

        Args:
            num_text_bytes, num_dropped: of the rows written here.

        Raises:
            DecantError: another process has written the split meanwhile.
        """
        self._add_digests()
        for arrays in self._arrays:
            arrays.finish()
        before = self._onto.info if self._onto else None
        if before and self._onto:
            self._replace_short_shards(before, self._onto.objects)
        objects = Objects(
            shards={name: e for arrays in self._arrays for name, e in arrays.entries.items()},
            tails={},
            used_ids=np.packbits(self._used, bitorder="little").tobytes().hex(),
        )
        num_rows = len(self._arrays[0])
        info = SplitInfo(
            format_version=FORMAT_VERSION,
            num_rows=num_rows,
            row_length=self._row_length,
            num_tokens=self._num_tokens,
            num_in_loss=self._num_in_loss,
            num_documents=self._num_documents,
            num_dropped=num_dropped + (before.num_dropped if before else 0),
            num_digests=len(self._arrays[1]),
            num_text_bytes=num_text_bytes + (before.num_text_bytes if before else 0),
            num_used_ids=int(self._used.sum()),
            leading_ids=leading_ids,
            vocab_size=len(self._used),
            tokenizer_sha256=tokenizer_sha256,
            sha256=self._sha256,
            prefixes=(*(before.prefixes if before else ()), (num_rows, self._sha256)),
            objects=self._write_objects(objects),
        )
        write_group(self._root, [], {})
        self._write_info(info)
        if read_info(self._folder, self._where) != info:
            raise DecantError(
                f"{self._where} was made by another process meanwhile: wait until that has ended, "
                "then run stages/corpus.py again"
            )
        for key in self._folder.sizes(OBJECTS).keys() - {objects_key(info.objects)}:
            self._folder.remove(key)
        return info

    def _add_digests(self) -> None:
        if self._digests:
            values = np.frombuffer(b"".join(self._digests), np.uint8).reshape(-1, DIGEST_BYTES)
            self._arrays[1].add({DIGESTS: values})
            self._digests = []

    def _replace_short_shards(self, info: SplitInfo, objects: Objects) -> None:
        """Steps 2 and 3 of an append, where a last shard grows."""
        longer = {name: new for arrays in self._arrays for name, new in arrays.longer.items()}
        if not longer:
            return
        shards = dict(objects.shards)
        for name, new in longer.items():
            shards[name] = [*shards[name][:-1], new.replaces]
        tails = {name: entry_of(new.key, new.data) for name, new in longer.items()}
        between = replace(objects, shards=shards, tails=tails)
        self._write_info(replace(info, objects=self._write_objects(between)))
        for new in longer.values():
            self._folder.write(new.key, new.data)

    def _write_objects(self, objects: Objects) -> Entry:
        text = json.dumps(asdict(objects)).encode()
        entry = entry_of(OBJECTS, text)
        self._folder.write(objects_key(entry), text)
        return entry

    def _write_info(self, info: SplitInfo) -> None:
        specs = list(split_specs(info).values())
        write_group(self._folder, specs, asdict(info), replace=self._onto is not None)


@dataclass(frozen=True)
class _Longer:
    """The successor of an array's last, short shard."""

    key: str
    data: bytes
    replaces: Entry  # what is there now


class _GrowingArrays:
    """Arrays of the same length that are written shard by shard; the last, short shard waits.

    Args:
        specs: the arrays, whatever their length.
        length: their length so far.
        shards: the size and hash of each array's shards so far.
        short: the last shards that are short, with size and hash.

    Attributes:
        entries: the size and hash of each array's shards.
        longer: the successors of the shards in `short`, by array; they are kept here, not written.
    """

    def __init__(
        self,
        folder: Folder,
        specs: dict[str, ArraySpec],
        *,
        length: int = 0,
        shards: Mapping[str, list[Entry]] | None = None,
        short: Mapping[str, tuple[Entry, NDArray[Any]]] | None = None,
    ) -> None:
        self.specs = specs
        self._folder = folder
        self._length = length
        self._short = {name: found for name, found in (short or {}).items() if name in specs}
        self._pending = {name: [values] for name, (_, values) in self._short.items()}
        self.entries = {name: list((shards or {}).get(name, ())) for name in specs}
        for name in self._short:
            self.entries[name].pop()
        self.longer: dict[str, _Longer] = {}

    def __len__(self) -> int:
        return self._length

    def add(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Append to each array; full shards are written immediately."""
        self._length += len(next(iter(values.values())))
        for name in self.specs:
            self._pending.setdefault(name, []).append(values[name])
        self._write(final=False)

    def finish(self) -> None:
        """Write what waits, as the last shard, which is short."""
        self._write(final=True)

    def _write(self, *, final: bool) -> None:
        for name, waiting in self._pending.items():
            spec = self.specs[name]
            size = spec.shard_rows
            while (length := sum(map(len, waiting))) >= size or (final and length):
                values = np.concatenate(waiting)
                self._write_shard(spec, values[:size])
                waiting[:] = [values[size:]]

    def _write_shard(self, spec: ArraySpec, values: NDArray[Any]) -> None:
        entries = self.entries[spec.name]
        key = spec.key_of(len(entries))
        data = encode_shard(spec, values)
        if short := self._short.pop(spec.name, None):
            self.longer[spec.name] = _Longer(key, data, replaces=short[0])
        else:
            self._folder.write(key, data)
        entries.append(entry_of(key, data))
