"""Write a corpus and its cache as a folder that Hugging Face's `datasets` loads.

The folder holds one Parquet file per shard of the cache, named by split and number, and a README.md
with the table of what the cache was made from, which is also the metadata of each file's schema.
Only one shard is in memory. The folder takes its name when it is complete
(`pipeline/io/ownership.py`).

    datasets.load_dataset(FOLDER, split="train")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.packing import Rows
from pipeline.errors import ParamsError
from pipeline.io.ownership import atomic_folder
from pipeline.logit_cache.format import Fingerprint
from pipeline.logit_cache.reader import CacheReader
from pipeline.runtime.console import progress_bar
from pipeline.runtime.markdown import markdown_table
from pipeline.targets.topk import TopK

Table = dict[str, Any]
"""Columns of pyarrow, by name."""

_CARD = """---
configs:
- config_name: default
  data_files:
  - {{split: train, path: train-*.parquet}}
  - {{split: validation, path: validation-*.parquet}}
---

# {title}

{text}

{table}
"""


_SHOWN = (
    "imported_from",
    "teacher_sha256",
    "tokenizer_sha256",
    "dtype",
    "engine",
    "document_mask",
    "k",
    "num_sampled",
    "temperatures",
    "top_p",
    "entropy_quantile",
    "vocab_size",
    "row_length",
)
"""The fields of the fingerprint in the README.md."""


def write_dataset(
    output: Path,
    readers: Sequence[CacheReader],
    to_table: Callable[[Rows, TopK], Table],
    *,
    k: int | None,
    text: str,
) -> int:
    """Write the shards of all splits as files, and return the number of rows written.

    Args:
        output: the folder, new or written by this function.
        to_table: makes the columns of a file from a shard's rows and their targets [n, L, ...].
        k: number of most probable ids to keep of each position; None keeps all.
        text: a sentence for the folder's README.md; a description of what is kept follows it.

    Raises:
        ParamsError: k exceeds what is stored, or sampled ids were taken outside of it.
        MismatchError: the output is not one of our folders, or a shard is damaged.
        DecantError: another process is writing the folder, or the disk is full.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = [_about(reader.fingerprint, k) for reader in readers]
    total, num_rows = sum(len(reader.corpus) for reader in readers), 0
    with (
        atomic_folder(output, "dataset", key="--output") as folder,
        progress_bar(what="convert", total=total, unit="row") as bar,
    ):
        for reader, fingerprint in zip(readers, about, strict=True):
            metadata = {"decant": json.dumps(asdict(fingerprint))}
            shards = reader.layout.num_shards
            for number in range(shards):
                shard = reader.shard(number)
                rows = shard.rows
                places = [(shard, shard.first + row) for row in range(len(rows))]
                topk = reader.gather(places)
                table = pa.table(to_table(rows, topk if k is None else topk.prefix(k)))
                table = table.replace_schema_metadata(metadata)
                name = f"{reader.corpus.split}-{number:05d}-of-{shards:05d}.parquet"
                pq.write_table(table, folder / name, compression="zstd")
                num_rows += table.num_rows
                bar.update(len(rows))
        shown = [(name, str(getattr(about[0], name))) for name in _SHOWN]
        card = _CARD.format(
            title=output.name,
            text=f"{text}: {_words_of(about[0])}.",
            table=markdown_table(("made from", ""), shown),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return num_rows


def lists(values: NDArray[Any], lengths: NDArray[Any]) -> Any:
    """Return a column of lists: the values one list after another, and the length of each."""
    import pyarrow as pa

    return _listed(pa.array(values), lengths)


def lists_of_lists(values: Tensor, is_filled: Tensor, lengths: NDArray[Any]) -> Any:
    """Return a column with one list per position, of those of its slots that are filled.

    Args:
        values, is_filled: [positions, slots].
        lengths: the number of positions of each row of the column.
    """
    import pyarrow as pa

    inner = _listed(pa.array(values[is_filled].numpy()), is_filled.sum(-1).numpy())
    return _listed(inner, lengths)


def _listed(values: Any, lengths: NDArray[Any]) -> Any:
    import pyarrow as pa

    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _about(made_from: Fingerprint, k: int | None) -> Fingerprint:
    """Return the fingerprint of a cache of which only the first k ids are kept."""
    if k is None:
        return made_from
    if k > made_from.k:
        raise ParamsError(f"--k {k} exceeds the {made_from.k} ids per position of the cache")
    if k < made_from.k and made_from.num_sampled:
        raise ParamsError(
            f"--k {k} does not go with sampled ids, which were taken outside the {made_from.k} ids "
            "of the cache: leave it out"
        )
    return replace(made_from, k=k)


def _words_of(made_from: Fingerprint) -> str:
    origin = made_from.imported_from
    return f"{made_from.kept} of each position" + (f", imported from {origin}" if origin else "")
