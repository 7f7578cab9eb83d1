"""The documents of a DistillKit capture, with the targets of their positions.

A capture is a folder of Parquet files (as its vLLM capture writes them) or Arrow files (as its
packing does, by `save_to_disk`), with one sequence or several packed ones per row:

    input_ids       the tokens
    attention_mask  optional; packed sequences are numbered 1, 2, ..., and 0 is padding
    labels          optional; -100 where the token is not a target, else the token
    and the columns of pipeline/interchange/distillkit_codec.py, one entry per position

Alignment. Entry t of a row is the distribution of the model's output at token t, which predicts
token t + 1, as in Decant's cache: DistillKit's capture drops the first of vLLM's prompt_logprobs,
which is empty, so that entry 0 is the distribution of token 1. The last token of a row that was not
packed therefore has no entry. Each sequence was captured on its own, so documents do not attend to
each other.

The values are natural logarithms of the probabilities at temperature 1 over the whole vocabulary
(vLLM's raw_logprobs). Decoded values may be out of order, and their probabilities may add up to
more than 1, since a polynomial and few bits only approximate them. They are sorted, and where the
sum exceeds 1 they are divided by it, since no distribution has such a sum. Ids beyond the
tokenizer's, rows of the head that are padding, are left out, and their mass counts to the tail.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.packing import IGNORE, PADDING, Document
from pipeline.errors import DecantError, ParamsError, reason_of
from pipeline.interchange.distillkit_codec import (
    AnyCompression,
    Compression,
    LegacyCompression,
    read_compression,
)
from pipeline.io.checked_json import DamagedError
from pipeline.io.files import require_regular_files
from pipeline.io.hashes import hash_file
from pipeline.runtime.console import progress

Chosen = TypeVar("Chosen")
COMPRESSION_FILE = "compression_config.yaml"
_FORMS = {
    "raw": ("token_ids", "top_values"),
    "legacy": ("packed_indices", "exact_values", "coeffs"),
    "compressed": ("bytepacked_indices", "compressed_logprobs"),
}
"""Columns of each form of the targets; DistillKit looks for them in this order."""
_ROWS_AT_ONCE = 16  # of up to 16,384 tokens
_LOGITS_FROM = 1.0  # nats: probabilities that add up to more than e are none
_NOTABLE = 1e-3  # nats by which a sum of probabilities exceeds 1, beyond rounding


@dataclass(frozen=True)
class Targets:
    """The kept ids of n positions in descending order; empty slots come last, with -inf."""

    ids: NDArray[np.int64]  # [n, K]
    logprobs: NDArray[np.float32]  # [n, K]


@dataclass
class Cleaned:
    """Counts of what decoding had to change."""

    positions: int = 0
    divided: int = 0  # positions whose probabilities added up to more than 1
    beyond: int = 0  # kept ids beyond the tokenizer's


class DistillKitCapture:
    """A capture of DistillKit; each call of its methods reads the files once.

    Args:
        source: its folder, or its files.
        compression: the file with the configuration of its compression; None looks for
            compression_config.yaml beside the files.

    Raises:
        ParamsError: there are no files, a column is missing, or the configuration is missing or
            that of another form.
        DecantError: a file cannot be read.
    """

    name = "distillkit"

    def __init__(self, source: Sequence[Path], compression: Path | None) -> None:
        self.files = _find_files(source)
        forms = {file: _form_of(file, columns) for file, columns in map(_columns, self.files)}
        self._form = forms[self.files[0]]
        for file, form in forms.items():
            if form != self._form:
                raise ParamsError(
                    f"{file} has the columns {', '.join(_FORMS[form])} and {self.files[0]} "
                    f"{', '.join(_FORMS[self._form])}: import one capture at a time"
                )
        self._compression = self._find_compression(compression)

    def _find_compression(self, given: Path | None) -> AnyCompression | None:
        beside = self.files[0].parent / COMPRESSION_FILE
        columns = ", ".join(_FORMS[self._form])
        if self._form == "raw":
            if given is not None:
                raise ParamsError(
                    f"--compression {given} goes with compressed columns, and {self.files[0]} has "
                    f"{columns}: leave it out"
                )
            return None
        if given is None and not beside.exists():
            raise ParamsError(
                f"{self.files[0].parent} holds no {COMPRESSION_FILE}, without which its columns "
                f"{columns} cannot be decoded: name the capture's configuration by --compression"
            )
        file = given or beside
        found = read_compression(file)
        if isinstance(found, LegacyCompression) != (self._form == "legacy"):
            raise ParamsError(
                f"{file} describes another form of compression than the columns {columns} of "
                f"{self.files[0]} have: give the configuration that the capture was made with"
            )
        return found

    @property
    def k(self) -> int:
        """K, the number of ids that are kept of each position."""
        if self._compression is not None:
            return self._compression.k
        for place, row in _rows(self.files, _FORMS["raw"][:1]):
            with _damage(place):
                return int(_matrix(row["token_ids"]).shape[1])
        raise DecantError(f"{self.files[0]} holds no rows: name the capture's files by --source")

    def sha256(self) -> str:
        """Return the sha256 of the files, in order of their names, and of the configuration."""
        total = hashlib.sha256(json.dumps(_values_of(self._compression)).encode())
        for file in progress(self.files, what="convert: hash", unit="file"):
            total.update(bytes.fromhex(hash_file(file)))
        return total.hexdigest()

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yield every document, without its targets, and its place for messages.

        Raises:
            DecantError: a file is damaged; the message says where.
        """
        wanted = ("input_ids", "attention_mask", "labels")
        for place, row in _rows(self.files, wanted):
            with _damage(place):
                for part in _documents_of(row):
                    yield place, part.document

    def targets(
        self,
        choose: Callable[[str, Document], tuple[Chosen, int] | None],
        vocab_size: int,
        counts: Cleaned,
    ) -> Iterator[tuple[Chosen, Targets]]:
        """Yield what is chosen, with the targets of the document's first positions.

        Args:
            choose: is given each document and its place, and returns what stands for it and how
                many positions are wanted, at most all but the last; None leaves it out.
            vocab_size: number of the tokenizer's ids; targets beyond them are left out.

        Raises:
            DecantError: a file is damaged or holds logits; the message says where.
        """
        num_ids = self._compression.num_ids if self._compression else None
        columns = ("input_ids", "attention_mask", "labels", *_FORMS[self._form])
        for place, row in _rows(self.files, columns):
            with _damage(place):
                arrays: list[NDArray[Any]] = []
                for part in _documents_of(row):
                    if (choice := choose(place, part.document)) is None:
                        continue
                    chosen, length = choice
                    arrays = arrays or self._arrays_of(row)
                    positions = slice(part.start, part.start + length)
                    ids, values = self._decode([array[positions] for array in arrays])
                    found = Targets(ids, values.float().numpy())
                    yield chosen, clean(found, num_ids, vocab_size, counts)

    def _arrays_of(self, row: dict[str, Any]) -> list[NDArray[Any]]:
        """Return the columns of a row's targets, each with one entry per position."""
        arrays = [_matrix(row[name]) for name in _FORMS[self._form]]
        num_tokens = len(_vector(row["input_ids"]))
        for name, array in zip(_FORMS[self._form], arrays, strict=True):
            if not num_tokens - 1 <= len(array) <= num_tokens or len(array) != len(arrays[0]):
                raise DamagedError(f"it has {num_tokens} tokens and {len(array)} entries of {name}")
        return arrays

    def _decode(self, arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[np.int64], Tensor]:
        if isinstance(self._compression, LegacyCompression):
            return self._compression.decode(arrays[0], arrays[1], arrays[2])
        if isinstance(self._compression, Compression):
            return self._compression.decode(arrays[0], arrays[1])
        ids, values = arrays
        if ids.shape != values.shape:
            raise DamagedError(f"it has {ids.shape[1]} token_ids and {values.shape[1]} top_values")
        return ids.astype(np.int64), torch.from_numpy(values.astype(np.float32))


def clean(found: Targets, num_ids: int | None, vocab_size: int, counts: Cleaned) -> Targets:
    """Sort decoded targets, and make a distribution of each position.

    Args:
        num_ids: ids of the teacher's distribution; None if that is not known.
        vocab_size: ids of the tokenizer.

    Raises:
        DamagedError: the values are not log-probabilities, or an id is impossible.
    """
    ids, logprobs = found.ids, found.logprobs
    if np.isnan(logprobs).any():
        raise DamagedError("it has values that are not numbers")
    is_kept = logprobs > -np.inf
    limit = num_ids or 2**32
    if wrong := ids[is_kept & ((ids < 0) | (ids >= limit))].tolist():
        raise DamagedError(f"it holds id {wrong[0]} of {limit:,}: check --compression")
    is_beyond = is_kept & (ids >= vocab_size)
    logprobs = np.where(is_beyond, np.float32(-np.inf), logprobs)
    is_kept &= ~is_beyond
    if not is_kept.any(-1).all():
        raise DamagedError(f"position {int(is_kept.any(-1).argmin())} keeps no id")
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    ids, logprobs = np.take_along_axis(ids, order, -1), np.take_along_axis(logprobs, order, -1)
    is_kept = logprobs > -np.inf
    ids = np.where(is_kept, ids, ids[:, :1])
    by_id = np.sort(np.where(is_kept, ids, -1 - np.arange(ids.shape[1])), axis=-1)
    if (by_id[:, 1:] == by_id[:, :-1]).any():
        raise DamagedError("a position holds an id twice: check --compression")
    total = torch.from_numpy(logprobs).logsumexp(-1, keepdim=True).numpy()
    if (largest := float(total.max(initial=-np.inf))) > _LOGITS_FROM:
        raise DamagedError(
            f"the probabilities of a position add up to {np.exp(largest):.3g}, so its values are "
            "logits, whose normaliser is not known, or the configuration is another one's"
        )
    counts.positions += len(ids)
    counts.divided += int((total > _NOTABLE).sum())
    counts.beyond += int(is_beyond.sum())
    return Targets(ids, logprobs - np.maximum(total, np.float32(0.0)))


@dataclass(frozen=True)
class _Part:
    """A document of a row."""

    start: int
    document: Document


def _documents_of(row: dict[str, Any]) -> Iterator[_Part]:
    """Yield the documents of a row in order; padding belongs to none."""
    tokens = _vector(row["input_ids"])
    in_loss = np.ones(len(tokens), np.bool_)
    numbers = np.ones(len(tokens), np.int64)
    if "labels" in row:
        labels = _vector(row["labels"])
        _require_length("labels", labels, tokens)
        in_loss = labels != IGNORE
        if (other := in_loss & (labels != tokens)).any():
            at = int(other.argmax())
            raise DamagedError(
                f"its label at token {at} is {labels[at]} where the token is {tokens[at]}, and a "
                "corpus has no labels of its own"
            )
    if "attention_mask" in row:
        numbers = _vector(row["attention_mask"])
        _require_length("attention_mask", numbers, tokens)
    numbers = np.where(numbers == 0, PADDING, numbers)
    bounds = np.flatnonzero(np.diff(numbers, prepend=PADDING - 1, append=PADDING - 1)).tolist()
    for start, stop in pairwise(bounds):
        if numbers[start] != PADDING:
            yield _Part(start, Document(tokens[start:stop], in_loss[start:stop]))


def _require_length(name: str, values: NDArray[Any], tokens: NDArray[Any]) -> None:
    if len(values) != len(tokens):
        raise DamagedError(f"it has {len(tokens)} tokens and {len(values)} entries of {name}")


def _find_files(source: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in source:
        if not path.exists():
            raise ParamsError(f"--source {path} does not exist: name a folder, or a file")
        inside = sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.arrow"))
        if path.is_dir() and not inside:
            raise ParamsError(
                f"--source {path} holds no .parquet or .arrow files: name their folder"
            )
        found += inside or [path]
    require_regular_files(found)
    return found


def _columns(file: Path) -> tuple[Path, list[str]]:
    with _readable(file), _opened(file) as (schema, _):
        return file, schema.names


def _form_of(file: Path, columns: Sequence[str]) -> str:
    """Return the form of the targets in a file."""
    for form, wanted in _FORMS.items():
        if {"input_ids", *wanted} <= set(columns):
            return form
    forms = "; ".join(", ".join(wanted) for wanted in _FORMS.values())
    raise ParamsError(
        f"{file} has the columns {', '.join(columns)}, and a capture of DistillKit has input_ids "
        f"and one of these groups: {forms}"
    )


def _values_of(compression: AnyCompression | None) -> dict[str, Any] | None:
    return None if compression is None else compression.model_dump(mode="json")


def _rows(files: Sequence[Path], columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row's place, and those of the columns that there are, as pyarrow's scalars."""
    for file in files:
        number = 0
        with _readable(file), _opened(file) as (schema, batches):
            there = [name for name in columns if name in schema.names]
            for batch in batches(there):
                for index in range(batch.num_rows):
                    yield (
                        f"row {number} of {file}",
                        {name: batch.column(name)[index] for name in there},
                    )
                    number += 1


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Any]]:
    """Open a Parquet or Arrow file: its schema, and a function from columns to record batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as parquet:
            yield (
                parquet.schema_arrow,
                lambda columns: parquet.iter_batches(_ROWS_AT_ONCE, columns=columns),
            )
        return
    with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
        yield stream.schema, lambda columns: (batch.select(columns) for batch in stream)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Report damage that pyarrow finds as one sentence."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DecantError(
            f"{file} cannot be read ({reason_of(error)}): download or copy it again"
        ) from None


@contextmanager
def _damage(place: str) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise DecantError(
            f"{place} cannot be imported, {error}: correct the file, or leave it out"
        ) from None


def _vector(value: Any) -> NDArray[np.int64]:
    """Return a list of integers."""
    if value.values is None or value.values.null_count:
        raise DamagedError("it has nulls")
    found: NDArray[np.int64] = value.values.to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _matrix(value: Any) -> NDArray[Any]:
    """Return a list of lists of equal length."""
    import pyarrow.compute as pc

    rows = value.values
    if rows is None or rows.null_count:
        raise DamagedError("it has nulls")
    lengths = pc.list_value_length(rows).to_numpy(zero_copy_only=False)
    if len(lengths) and (lengths != lengths[0]).any():
        raise DamagedError("its positions have different numbers of entries")
    flat = rows.flatten()
    if flat.null_count:
        raise DamagedError("it has nulls")
    width = int(lengths[0]) if len(lengths) else 0
    found: NDArray[Any] = flat.to_numpy(zero_copy_only=False).reshape(len(lengths), width)
    return found
