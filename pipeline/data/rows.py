"""The tokenized corpus on disk: `corpus.zarr` with the groups `train` and `validation`.

Each group holds `tokens` (uint16 when the vocabulary fits, else uint32) and `doc_ids` (int32), both
[N, L], and attributes that describe them. The attributes, with the sha256 of all rows, are written
last: a group without them was interrupted and is refused. The sha256 goes into the fingerprint of
every cache made from the corpus, so a cache can not be paired with other tokens.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.data.packing import PADDING, Rows
from pipeline.errors import DecantError

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
_ROWS_PER_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What one split holds; stored as the group's attributes."""

    format_version: int
    num_rows: int  # N
    row_length: int  # L
    num_tokens: int  # without padding
    num_documents: int
    num_text_bytes: int  # UTF-8 bytes of the documents taken
    num_used_ids: int  # different token ids that occur
    vocab_size: int  # ids a tokenizer can produce: largest id + 1
    tokenizer_sha256: str
    sha256: str  # of tokens and doc_ids, row by row


def hash_rows(rows: Rows) -> bytes:
    """sha256 over rows: each row's tokens as little-endian uint32, then its doc_ids as int32."""
    digest = hashlib.sha256()
    for tokens, doc_ids in zip(rows.tokens, rows.doc_ids, strict=True):
        digest.update(tokens.astype("<u4").tobytes())
        digest.update(doc_ids.astype("<i4").tobytes())
    return digest.digest()


def write_split(
    path: Path,
    split: str,
    blocks: Iterable[Rows],
    *,
    row_length: int,
    vocab_size: int,
    tokenizer_sha256: str,
) -> SplitInfo:
    """Stream blocks of rows into the group `split`, replacing an older one.

    Returns:
        The attributes for `seal_split`; `num_text_bytes` is left 0, for the reader of documents.
    """
    shutil.rmtree(path / split, ignore_errors=True)
    root = zarr.open_group(path, mode="a")
    group = root.create_group(split)
    common: dict[str, Any] = {
        "shape": (0, row_length),
        "chunks": (_ROWS_PER_CHUNK, row_length),
        "shards": (_ROWS_PER_CHUNK * 64, row_length),
    }
    token_dtype = "uint16" if vocab_size <= 65_536 else "uint32"
    arrays = {
        "tokens": group.create_array("tokens", dtype=token_dtype, **common),
        "doc_ids": group.create_array("doc_ids", dtype="int32", fill_value=PADDING, **common),
    }
    digest = hashlib.sha256()
    used = np.zeros(vocab_size, dtype=bool)
    num_rows = num_tokens = num_documents = 0
    for rows in blocks:
        end = num_rows + len(rows)
        for name, array in arrays.items():
            array.resize((end, row_length))
            array[num_rows:end] = getattr(rows, name)
        digest.update(hash_rows(rows))
        real = rows.doc_ids != PADDING
        used[rows.tokens[real]] = True
        num_tokens += int(real.sum())
        num_documents = max(num_documents, int(rows.doc_ids.max()) + 1)
        num_rows = end
    return SplitInfo(
        format_version=FORMAT_VERSION,
        num_rows=num_rows,
        row_length=row_length,
        num_tokens=num_tokens,
        num_documents=num_documents,
        num_text_bytes=0,
        num_used_ids=int(used.sum()),
        vocab_size=vocab_size,
        tokenizer_sha256=tokenizer_sha256,
        sha256=digest.hexdigest(),
    )


def seal_split(path: Path, split: str, info: SplitInfo) -> None:
    """Write the attributes that make a split count as complete."""
    zarr.open_group(path, path=split, mode="r+").attrs.update(asdict(info))


class CorpusSplit:
    """Read access to one split; `info` describes it."""

    def __init__(self, path: Path, split: str) -> None:
        try:
            group = zarr.open_group(path, path=split, mode="r")
            attributes: dict[str, Any] = dict(group.attrs)
        except (OSError, ValueError):
            attributes = {}
        if not attributes:
            raise DecantError(
                f"{path} holds no complete {split} split: run stages/corpus.py (or `dvc repro`)"
            )
        if attributes.get("format_version") != FORMAT_VERSION:
            raise DecantError(
                f"{path} has format version {attributes.get('format_version')}, this program reads"
                f" {FORMAT_VERSION}: run stages/corpus.py again"
            )
        self.path = path
        self.split = split
        self.info = SplitInfo(**attributes)
        self._tokens: Any = group["tokens"]
        self._doc_ids: Any = group["doc_ids"]

    def __len__(self) -> int:
        return self.info.num_rows

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start..stop in corpus order."""
        tokens: NDArray[Any] = self._tokens[start:stop]
        return Rows(tokens=tokens.astype(np.int64), doc_ids=self._doc_ids[start:stop])
