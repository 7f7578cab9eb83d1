"""The sources of documents: Python's standard library, local files, or a dataset on the hub.

Only the wanted column of files and datasets is read, so files may differ in all other columns. A
row that cannot be read as a document (a broken line, a number among texts) is passed on with the
reason, so that the corpus can count it and leave it out. A fault of a whole file or column is an
error.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.config.source_params import HubCorpus, TextSource
from pipeline.errors import DecantError, ParamsError, reason_of

Message = dict[str, Any]

_KINDS = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
_COMPRESSED = ".gz"
_NOT_OURS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "ensurepip", "_vendor"}
_BYTE_ORDER_MARK = "\ufeff"
_ROWS_AT_ONCE = 64  # rows read at once from a parquet file
_ROWS_TO_JUDGE_BY = 100  # without one document among them, the column is wrong, not the rows


@dataclass(frozen=True)
class Source:
    """A text, a conversation, or the reason why there is neither."""

    place: str  # for the user, for example "data/chats.jsonl, row 3"
    content: str | list[Message]
    fault: str | None = None
    position: int = 0  # bytes of the source up to the end of this document
    digest: bytes = b""  # of the content, once it is known


@dataclass
class Extent:
    """The amount of a source that has been read."""

    num_bytes: int = 0
    total_bytes: int | None = None  # None: unknown, for example for a streamed dataset


def read_documents(params: TextSource, extent: Extent) -> Iterator[Source]:
    """Yield all documents of a source that are not blank, in the same order in every run.

    Raises:
        DecantError: a file, a dataset or its column cannot be read.
    """
    if params.source == "stdlib":
        sources = _stdlib(extent)
    elif params.source == "files":
        sources = _files(params.files.paths, params.files.column, extent)
    else:
        sources = _hub(params.hub)
    for source in sources:
        content = source.content
        if isinstance(content, str):
            content = content.removeprefix(_BYTE_ORDER_MARK)
            if source.fault is None and (not content or content.isspace()):
                continue
        yield Source(source.place, content, source.fault, extent.num_bytes)


def stdlib_files() -> list[Path]:
    """List the source files of the running Python's standard library, shuffled by path hash."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _NOT_OURS)
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda file: _mix(file.relative_to(root).as_posix()))


def _stdlib(extent: Extent) -> Iterator[Source]:
    files = stdlib_files()
    extent.total_bytes = sum(file.stat().st_size for file in files)
    for file in files:
        extent.num_bytes += file.stat().st_size
        try:
            yield Source(str(file), file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a few files declare another encoding


def _mix(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _files(patterns: tuple[str, ...], column: str, extent: Extent) -> Iterator[Source]:
    files = find_files(patterns)
    kinds = {_kind(file) for file in files}
    if len(kinds) != 1 or None in kinds:
        endings = sorted({"".join(Path(file).suffixes[-2:]) or file for file in files})
        raise ParamsError(
            f"files.paths holds {', '.join(endings[:5])}: give files of one kind out of "
            f"text (.txt), JSON ({', '.join(e for e, kind in _KINDS.items() if kind == 'json')}), "
            f"both also as {_COMPRESSED}, and .parquet"
        )
    kind = kinds.pop()
    sizes = {file: Path(file).stat().st_size for file in files}
    extent.total_bytes = sum(sizes.values())
    read = 0
    if kind == "text":
        for file in files:
            extent.num_bytes += sizes[file]
            with _readable(file):
                yield _text(file)
        return

    def values() -> Iterator[tuple[str, Any]]:
        nonlocal read
        read_rows = _parquet_rows if kind == "parquet" else _json_rows
        for file in files:
            size = sizes[file]
            with _readable(file):
                for number, share, value in read_rows(file, column):
                    extent.num_bytes = read + int(size * share)
                    yield f"{file}, row {number}", value
            read += size
            extent.num_bytes = read

    yield from _sources(values(), column)


def find_files(patterns: tuple[str, ...]) -> list[str]:
    """Find files by name or pattern; brackets match themselves as well as a set of characters."""
    files: dict[str, None] = {}
    for pattern in patterns:
        if Path(pattern).is_dir():
            raise ParamsError(
                f"files.paths: {pattern!r} is a folder: name the files in it, for example "
                f"by {Path(pattern) / '*.jsonl'}"
            )
        matches = matching_files(pattern)
        if not matches:
            raise DecantError(f"files.paths: nothing matches {pattern!r}")
        files |= dict.fromkeys(matches)
    return list(files)


def matching_files(pattern: str) -> list[str]:
    """Return the files that a name or pattern stands for, in order; see `find_files`."""
    if Path(pattern).is_file():
        return [pattern]
    literal = pattern.replace("[", "[[]")
    found = {*glob.glob(pattern, recursive=True), *glob.glob(literal, recursive=True)}
    return sorted(file for file in found if Path(file).is_file())


def _kind(file: str) -> str | None:
    name = file.lower()
    kind = _KINDS.get(Path(name.removesuffix(_COMPRESSED)).suffix)
    return None if kind == "parquet" and name.endswith(_COMPRESSED) else kind


@contextmanager
def _opened(file: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file; yield its bytes, decompressed, and the file itself."""
    with Path(file).open("rb") as raw:
        if file.lower().endswith(_COMPRESSED):
            with gzip.open(raw) as stream:
                yield stream, raw  # type: ignore[misc]
        else:
            yield raw, raw


def _text(file: str) -> Source:
    with _opened(file) as (stream, _):
        try:
            return Source(file, io.TextIOWrapper(stream, encoding="utf-8-sig").read())
        except UnicodeDecodeError as error:
            return Source(file, "", f"it is not UTF-8 text ({error.reason})")


class _Fault(str):
    """A placeholder for a value: the reason why a row has none."""


class _Absent:
    """A placeholder for a value: the row does not have the column, only these."""

    def __init__(self, columns: list[str]) -> None:
        self.columns = columns


def _json_rows(file: str, column: str) -> Iterator[tuple[int, float, Any]]:
    """Yield each row's number (its line if there is one row per line), share read, and value."""
    size = max(Path(file).stat().st_size, 1)
    with _opened(file) as (stream, raw):
        if _is_one_value(file):
            value = json.loads(stream.read().decode("utf-8-sig"))
            rows = value if isinstance(value, list) else [value]
            for number, row in enumerate(rows, 1):
                yield number, number / len(rows), _value(row, column)
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    value = _value(json.loads(line.decode("utf-8-sig")), column)
                except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
                    value = _Fault(f"it cannot be read as JSON ({error})")
                yield number, raw.tell() / size, value


def _is_one_value(file: str) -> bool:
    """Return whether a .json file is one value or list over many lines, not one row per line."""
    if ".json" not in [suffix.lower() for suffix in Path(file).suffixes[-2:]]:
        return False
    with _opened(file) as (stream, _):
        for line in stream:
            if line.strip():
                try:
                    return not isinstance(json.loads(line.decode("utf-8-sig")), dict)
                except ValueError:
                    return True
    return False


def _value(row: Any, column: str) -> Any:
    if not isinstance(row, dict):
        return _Fault(f"it holds {str(row)[:40]!r} where an object with columns was expected")
    return row[column] if column in row else _Absent(list(row))


def _parquet_rows(file: str, column: str) -> Iterator[tuple[int, float, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        if column not in schema.names:
            raise ParamsError(_no_column(column, schema.names, file))
        kind = schema.field(column).type
        of_text = kind.value_type if pa.types.is_dictionary(kind) else kind
        tests = ("string", "large_string", "string_view", "list", "large_list", "null")
        if not any(getattr(pa.types, f"is_{test}")(of_text) for test in tests):
            raise ParamsError(
                f"the column {column!r} of {file} holds {kind}, neither text nor a list "
                "of messages: set the column's name"
            )
        total, done = max(parquet.metadata.num_rows, 1), 0
        for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=[column]):
            for value in batch.column(0).to_pylist():
                done += 1
                yield done, done / total, _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """Drop nulls from a typed table's value, where each message has the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _no_column(column: str, columns: list[str], where: str) -> str:
    return (
        f"there is no column {column!r}, only {', '.join(columns)} ({where}): set the column's name"
    )


def _hub(hub: HubCorpus) -> Iterator[Source]:
    import datasets

    def load(**options: Any) -> Any:
        return datasets.load_dataset(
            hub.id, hub.name, split=hub.split, revision=hub.revision, streaming=True, **options
        )

    def values() -> Iterator[tuple[str, Any]]:
        with _readable(f"dataset {hub.id} from the Hugging Face hub"):
            rows = load()
            columns = rows.column_names
            if columns is not None and hub.column not in columns:
                raise ParamsError(_no_column(hub.column, columns, hub.id))
            if rows.info.builder_name == "parquet":  # its reader can skip the other columns
                rows = load(columns=[hub.column])
            for number, row in enumerate(rows, 1):
                yield f"{hub.id}, row {number}", _without_nulls(_value(row, hub.column))

    return _sources(values(), hub.column)


def _sources(values: Iterator[tuple[str, Any]], column: str) -> Iterator[Source]:
    """Yield the documents of a column; if the first rows hold none, the column is the wrong one.

    A row without the column, or with null in it, is neither a document nor a fault: every library
    reads a table with differing rows in this way.
    """
    judged = False
    faults: list[Source] = []
    absent = 0
    for place, value in values:
        if isinstance(value, _Absent):
            absent += 1
            if not judged and absent == _ROWS_TO_JUDGE_BY:
                raise ParamsError(_no_column(column, value.columns, place))
            last = place, value
            continue
        if value is None or value == "" or value == []:
            continue
        source = _source(place, value, column)
        if source.fault is None:
            judged = True
            yield from faults
            faults = []
        if judged or isinstance(value, _Fault):
            yield source
        else:
            faults.append(source)
            if len(faults) == _ROWS_TO_JUDGE_BY:
                break
    if faults:
        raise ParamsError(f"{faults[0].place}: {faults[0].fault}: set the column's name")
    if absent and not judged:
        place, value = last
        raise ParamsError(_no_column(column, value.columns, place))


def _source(place: str, value: Any, column: str) -> Source:
    if isinstance(value, _Fault):
        return Source(place, "", str(value))
    if isinstance(value, str) or (
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
    ):
        return Source(place, value)
    return Source(
        place,
        "",
        f"the column {column!r} holds {str(value)[:40]!r}, neither text nor a list of messages",
    )


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn any exception of a file or hub reader into one sentence."""
    try:
        yield
    except DecantError:
        raise
    except Exception as error:  # file libraries pass on exceptions of many other libraries
        reason = reason_of(error, 300)
        raise DecantError(
            f"{what} cannot be read ({reason}): check the name, the file or the connection"
        ) from error
