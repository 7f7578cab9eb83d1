"""The stage `inputs`: two files for DVC that change exactly when teacher or text has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.config.params import Params, load_params
from pipeline.errors import DecantError
from pipeline.inputs import TEACHER, TEXT, write_inputs
from tests.helpers import change


@pytest.fixture
def params(tiny_params: Params, tmp_path: Path, text_folder: Path, teacher_folder: Path) -> Params:
    """Parameters of a teacher and a text of the test's own, described once."""
    values = yaml.safe_load((tmp_path / "params.yaml").read_text())
    shutil.copytree(teacher_folder, tmp_path / "model")
    shutil.copytree(text_folder, tmp_path / "text")
    values["teacher"]["folder"]["path"] = str(tmp_path / "model")
    values["corpus"]["files"]["paths"] = [str(tmp_path / "text" / "*.jsonl")]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    found = load_params(tmp_path / "params.yaml")
    assert write_inputs(found) == [TEACHER, TEXT]
    return found


def test_what_is_unchanged_is_left_alone(params: Params) -> None:
    before = (params.paths.inputs / TEXT).stat()
    assert write_inputs(params) == []
    assert (params.paths.inputs / TEXT).stat() == before


def test_each_changes_its_own_file(params: Params, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").write_bytes(b" ")
    assert write_inputs(params) == [TEACHER]
    shutil.copy(tmp_path / "text" / "documents.jsonl", tmp_path / "text" / "more.jsonl")
    assert write_inputs(params) == [TEXT]
    assert write_inputs(params) == []


def test_sources_that_have_gone_are_as_they_were(params: Params, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "text")
    assert write_inputs(params) == []
    elsewhere = change(params, paths={"inputs": str(tmp_path / "elsewhere")})
    with pytest.raises(DecantError, match=r"holds no config\.json"):
        write_inputs(elsewhere)


def test_a_gguf_file_is_followed_by_its_content(params: Params, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    section = {"source": "gguf", "gguf": {"path": str(file), "sha256": None}}
    of_gguf = change(params, teacher=section)
    with pytest.raises(DecantError, match="does not exist"):
        write_inputs(of_gguf)
    file.write_bytes(b"1")
    assert write_inputs(of_gguf) == [TEACHER]
    file.write_bytes(b"2")
    assert write_inputs(of_gguf) == [TEACHER]
    pinned = {"source": "gguf", "gguf": {"path": str(file), "sha256": "0" * 64}}
    with pytest.raises(DecantError, match="pinned is 0000"):
        write_inputs(change(params, teacher=pinned))
    file.unlink()
    assert write_inputs(of_gguf) == []
    elsewhere = {"source": "gguf", "gguf": {"path": str(tmp_path / "b.gguf"), "sha256": None}}
    with pytest.raises(DecantError, match=r"b\.gguf does not exist"):
        write_inputs(change(params, teacher=elsewhere))


def test_another_source_of_the_same_name_has_not_gone(params: Params, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    write_inputs(
        change(params, teacher={"source": "hub", "hub": {"id": "a/b", "revision": commit}})
    )
    with pytest.raises(DecantError, match=r"a/b holds no config\.json"):
        write_inputs(change(params, teacher={"source": "folder", "folder": {"path": "a/b"}}))


def test_a_link_to_nothing_is_named(params: Params, tmp_path: Path) -> None:
    file = tmp_path / "model" / "generation_config.json"
    file.unlink(missing_ok=True)
    file.symlink_to("absent")
    with pytest.raises(DecantError, match=r"generation_config\.json is a dangling link"):
        write_inputs(params)
