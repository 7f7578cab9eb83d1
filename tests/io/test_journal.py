"""Journals: torn and damaged lines, other inputs, a second process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import DecantError, MismatchError
from pipeline.io.journal import Journal


def test_journal_drops_a_torn_line_and_names_a_damaged_one(tmp_path: Path) -> None:
    file = tmp_path / "new" / "journal.jsonl"
    with Journal(file, {"a": 1}, key="paths.x", overwrite=False) as journal:
        journal.append([{"n": 1}, {"n": 2}])
        journal.append([{"n": 3}])
        with pytest.raises(DecantError, match=r"another process.* set paths.x to another"):
            Journal(file, {"a": 1}, key="paths.x", overwrite=True)
    data = file.read_bytes()
    for cut in range(len(data)):
        file.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        with Journal(file, {"a": 1}, key="paths.x", overwrite=False) as opened:
            assert [line["n"] for line in opened.lines] == [1, 2, 3][: max(whole - 1, 0)]
            opened.append([{"n": 9}])
        assert [json.loads(line) for line in file.read_text().splitlines()][-1] == {"n": 9}
        assert len(file.read_text().splitlines()) == max(whole, 1) + 1
    file.write_bytes(data.replace(b'{"n": 2}', b'{"n": 2'))
    with pytest.raises(DecantError, match="line 3 is damaged"):
        Journal(file, {"a": 1}, key="paths.x", overwrite=False)


def test_other_inputs_are_refused_or_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    with Journal(file, {"model": "m", "seed": 1}, key="paths.x", overwrite=False) as journal:
        journal.append([{"n": 1}])
    other = {"model": "m", "seed": 2}
    with pytest.raises(MismatchError, match=r"made with seed=1, not 2: run .* set paths.x to"):
        Journal(file, other, key="paths.x", overwrite=False)
    with Journal(file, other, key="paths.x", overwrite=True) as journal:
        assert journal.lines == []
