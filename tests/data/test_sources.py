"""Files as users have them: brackets, byte order marks, other columns, other endings, bad rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.params import Params
from pipeline.data.sources import Extent, Source, _stdlib, read_documents
from pipeline.errors import DecantError, ParamsError
from tests.helpers import change


def read(params: Params, *paths: Path | str, column: str = "text") -> list[Source]:
    """All documents of files."""
    files = {"paths": [str(path) for path in paths], "column": column}
    changed = change(params, corpus={"files": files})
    return list(read_documents(changed.corpus, Extent()))


def contents(sources: list[Source]) -> list[Any]:
    assert [source.fault for source in sources] == [None] * len(sources)
    return [source.content for source in sources]


def write_rows(file: Path, rows: Iterable[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows_of(*texts: str, **columns: Any) -> list[dict[str, Any]]:
    return [{"text": text} | columns for text in texts]


def test_brackets_in_names(tiny_params: Params, tmp_path: Path) -> None:
    """A file that exists is read, whatever its name would match as a pattern."""
    in_brackets = write_rows(tmp_path / "part[1].jsonl", rows_of("a"))
    assert contents(read(tiny_params, in_brackets)) == ["a"]
    assert contents(read(tiny_params, tmp_path / "*.jsonl")) == ["a"]
    write_rows(tmp_path / "part1.jsonl", rows_of("b"))
    write_rows(tmp_path / "part2.jsonl", rows_of("c"))
    assert contents(read(tiny_params, in_brackets)) == ["a"]
    assert contents(read(tiny_params, tmp_path / "*.jsonl")) == ["b", "c", "a"]
    assert contents(read(tiny_params, tmp_path / "part[12].json*")) == ["b", "c"]
    assert contents(read(tiny_params, tmp_path / "part[1].json*")) == ["b", "a"]
    inner = write_rows(tmp_path / "folder [x]" / "d.jsonl", rows_of("d"))
    assert contents(read(tiny_params, inner.parent / "*.jsonl", inner)) == ["d"]
    with pytest.raises(DecantError, match=r"nothing matches '.*part\[3\]\.jsonl'"):
        read(tiny_params, tmp_path / "part[3].jsonl")
    with pytest.raises(ParamsError, match=r"is a folder: name the files in it, .*\*\.jsonl"):
        read(tiny_params, tmp_path)


@pytest.mark.parametrize("ending", [".txt", ".TXT", ".txt.gz"])
def test_byte_order_marks_are_no_text(ending: str, tiny_params: Params, tmp_path: Path) -> None:
    pack = gzip.compress if ending.endswith(".gz") else bytes
    for name in "ab":
        text = f"\ufeffdocument {name} \ufeff\r\nends\n"
        (tmp_path / (name + ending)).write_bytes(pack(text.encode()))
    (tmp_path / f"blank{ending}").write_bytes(pack("\ufeff \n".encode()))
    found = contents(read(tiny_params, tmp_path / f"*{ending}"))
    assert found == [f"document {name} \ufeff\nends\n" for name in "ab"]


def test_byte_order_marks_in_rows(tiny_params: Params, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows_of("\ufeffa", "b")]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\ufeff".join(lines), encoding="utf-8")
    assert contents(read(tiny_params, tmp_path / "a.jsonl")) == ["a", "b"]


@pytest.mark.parametrize(
    "ending", [".jsonl", ".JSONL", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".Json.GZ"]
)
def test_endings_of_rows(ending: str, tiny_params: Params, tmp_path: Path) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows_of("a", "b\u2028c")).encode()
    file = tmp_path / f"rows{ending}"
    file.write_bytes(gzip.compress(data) if ending.lower().endswith(".gz") else data)
    extent = Extent()
    params = change(tiny_params, corpus={"files": {"paths": [str(file)], "column": "text"}})
    assert contents(list(read_documents(params.corpus, extent))) == ["a", "b\u2028c"]
    assert extent.num_bytes == extent.total_bytes == file.stat().st_size


def test_json_that_is_no_lines(tiny_params: Params, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(rows_of("a", "b"), indent=2))
    (tmp_path / "one.json").write_text(json.dumps(rows_of("c")[0], indent=2))
    found = read(tiny_params, tmp_path / "list.json", tmp_path / "one.json")
    assert contents(found) == ["a", "b", "c"]
    assert found[1].place == f"{tmp_path}/list.json, row 2"


def test_only_the_wanted_column_is_read(tiny_params: Params, tmp_path: Path) -> None:
    """Files that differ in columns nobody asked for, in ways that no common type holds."""
    others = [{"src": "a"}, {"src": "b", "link": "x"}, [], [{"id": 1}], 1, "1", None]
    for number, other in enumerate(others):
        write_rows(tmp_path / f"{number}.jsonl", rows_of(f"text {number}", meta=other))
    write_rows(tmp_path / "7.jsonl", [{"text": None}, {"meta": 1}, {"text": "text 7"}])
    assert contents(read(tiny_params, tmp_path / "*.jsonl")) == [f"text {n}" for n in range(8)]
    numbers = [pa.array([1], pa.int32()), pa.array([1], pa.int64()), pa.array(["x"])]
    for number, values in enumerate(numbers):
        table = pa.table({"n": values, f"only{number}": [0], "text": [f"text {number}"]})
        pq.write_table(table, tmp_path / f"{number}.PARQUET")
    found = contents(read(tiny_params, tmp_path / "*.PARQUET"))
    assert found == [f"text {n}" for n in range(3)]


def test_a_dataset_whose_files_differ(tiny_params: Params, tmp_path: Path) -> None:
    """A local folder stands for one on the hub; the reader of parquet takes the wanted column."""
    for number, values in enumerate([pa.array([1]), pa.array(["x"])]):
        table = pa.table({"n": values, "text": [f"text {number}"]})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    hub = {"id": str(tmp_path), "name": None, "revision": "main", "split": "train"}

    def rows(column: str) -> list[Any]:
        params = change(tiny_params, corpus={"source": "hub", "hub": hub | {"column": column}})
        return contents(list(read_documents(params.corpus, Extent())))

    assert rows("text") == ["text 0", "text 1"]
    with pytest.raises(ParamsError, match=r"no column 'body', only n, text"):
        rows("body")


@pytest.mark.parametrize("value", [5, 0.5, True, [1, 2], {"a": 1}, ["a", "b"]])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_of_something_else_is_one_sentence(
    kind: str, value: Any, tiny_params: Params, tmp_path: Path
) -> None:
    file = tmp_path / f"rows.{kind}"
    rows = rows_of(*"abcdefgh", n=value)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        write_rows(file, rows)
    with pytest.raises(ParamsError, match="neither text nor a list of messages: set the") as caught:
        read(tiny_params, file, column="n")
    assert "column 'n'" in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nulls_of_a_typed_table_are_absent(tiny_params: Params, tmp_path: Path) -> None:
    """Its messages all have the same keys; in lines of JSON a null was written on purpose."""
    messages = [[{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "name": "f"}]]
    pq.write_table(pa.table({"text": messages}), tmp_path / "a.parquet")
    assert contents(read(tiny_params, tmp_path / "a.parquet")) == messages
    messages[0][0]["name"] = None  # type: ignore[assignment]
    write_rows(tmp_path / "a.jsonl", [{"text": messages[0]}])
    assert contents(read(tiny_params, tmp_path / "a.jsonl")) == messages


def test_bad_rows_are_handed_on_with_file_and_row(tiny_params: Params, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"text": "good"}).encode()
    bad = [b'{"text": "unfin', b'{"text": "\xff"}', b"7", b'{"text": 7}']
    file.write_bytes(b"\n".join([good, b"", *bad, good]))
    found = read(tiny_params, file)
    assert [source.content for source in found if source.fault is None] == ["good", "good"]
    faults = {source.place: source.fault for source in found if source.fault}
    assert list(faults) == [f"{file}, row {number}" for number in (3, 4, 5, 6)]
    for fault, words in zip(faults.values(), ["as JSON", "utf-8", "'7'", "'7'"], strict=True):
        assert words in str(fault)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (source,) = read(tiny_params, tmp_path / "latin.txt")
    assert source.fault == "it is not UTF-8 text (unexpected end of data)"


def test_what_is_wrong_with_a_whole_file_is_an_error(tiny_params: Params, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", rows_of("a", "b", other=1))
    with pytest.raises(ParamsError, match=r"no column 'body', only text, other \(.*a.jsonl, row"):
        read(tiny_params, rows, column="body")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}" * 1000)[:-30])
    with pytest.raises(DecantError, match=r"a.jsonl.gz cannot be read \("):
        read(tiny_params, tmp_path / "a.jsonl.gz")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DecantError, match=r"a.parquet cannot be read \("):
        read(tiny_params, tmp_path / "a.parquet")
    with pytest.raises(ParamsError, match="one kind out of"):
        read(tiny_params, rows, tmp_path / "a.parquet")


def test_stdlib_without_tests_and_vendored_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["one.py", "package/two.py"]
    left_out = ["test/a.py", "site-packages/b.py", "package/tests/c.py", "ensurepip/d.py", "e.txt"]
    for name in kept + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    found = sorted(str(source.content) for source in _stdlib(Extent()))
    assert found == [f"# {name}" for name in kept]
