"""A corpus is made anew when its text, its tokenizer or a parameter has changed, and only then."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from pipeline.config.params import Params, load_params
from pipeline.data import text_hashes as module
from pipeline.data.corpus_zarr import CorpusSplit, read_made_from
from pipeline.data.text_hashes import made_from, text_made_from
from pipeline.errors import DecantError
from pipeline.inputs import write_inputs
from pipeline.io import hashes
from pipeline.io.hashes import SEEN_TEXT
from stages.corpus import main
from tests.helpers import change


class Stage:
    """The stage over a text and a teacher of its own; `made()` says whether it had work to do."""

    def __init__(self, folder: Path, text: Path, teacher: Path) -> None:
        self.text = shutil.copytree(text, folder / "text") / "documents.jsonl"
        self.teacher = shutil.copytree(teacher, folder / "teacher")
        self._params = folder / "params.yaml"
        values = yaml.safe_load(self._params.read_text())
        values["paths"]["teacher"] = str(self.teacher)
        values["corpus"]["files"]["paths"] = [str(self.text.parent / "*.jsonl")]
        self._params.write_text(yaml.safe_dump(values))
        self.corpus = Path(values["paths"]["corpus"])
        self.seen = Path(values["paths"]["inputs"]) / SEEN_TEXT

    def made(self, *words: str) -> bool:
        done = CliRunner().invoke(main, ["--params", str(self._params), *words])
        assert done.exit_code == 0, done.output
        return "has nothing to do" not in done.output

    def sha256(self) -> str:
        return CorpusSplit(self.corpus, "train").info.sha256


@pytest.fixture
def stage(tiny_params: Params, tmp_path: Path, text_folder: Path, teacher_folder: Path) -> Stage:
    found = Stage(tmp_path, text_folder, teacher_folder)
    assert found.made()
    assert not found.made()
    return found


def test_files_that_change_come_or_go(stage: Stage) -> None:
    before = stage.sha256()
    stage.text.write_text(stage.text.read_text().replace("Note", "Page"))
    assert stage.made()
    assert stage.sha256() != before
    another = stage.text.with_name("more.jsonl")
    shutil.copy(stage.text, another)
    assert stage.made()
    another.unlink()
    assert stage.made()
    assert not stage.made()


def test_a_file_that_was_only_touched_changes_nothing(stage: Stage) -> None:
    os.utime(stage.text, (1, 1))
    pointer = (stage.corpus / "source.json").read_bytes()
    assert not stage.made()
    assert (stage.corpus / "source.json").read_bytes() == pointer


def test_text_that_has_gone_is_as_it_was(stage: Stage) -> None:
    """As on a machine that pulled the corpus alone; for other rows of it the text is needed."""
    stage.text.unlink()
    assert not stage.made()
    done = CliRunner().invoke(
        main, ["--params", str(stage._params), "--set", "corpus.row_length=16"]
    )
    assert done.exit_code == 1
    assert "nothing matches" in done.output
    assert not stage.made()  # what failed has taken nothing away


def test_one_file_that_has_gone_is_not_all_text_that_has(stage: Stage) -> None:
    another = stage.text.with_name("more.jsonl")
    shutil.copy(stage.text, another)
    files = f"corpus.files.paths=[{stage.text},{another}]"
    assert stage.made("--set", files)
    another.unlink()
    done = CliRunner().invoke(main, ["--params", str(stage._params), "--set", files])
    assert done.exit_code == 1
    assert "nothing matches" in done.output


def test_brackets_that_stand_for_themselves_are_found_here_too(stage: Stage) -> None:
    bracketed = stage.text.rename(stage.text.with_name("part[1].jsonl"))
    files = f"corpus.files.paths=['{stage.text.parent}/part[1]*.jsonl']"
    assert stage.made("--set", files)
    bracketed.write_text(bracketed.read_text().replace("Note", "Page"))
    assert stage.made("--set", files)


def test_stages_share_one_memory_of_hashes(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under DVC `inputs` runs first; what it has hashed, `corpus` need not read again."""
    stage.text.write_text(stage.text.read_text().replace("Note", "Page"))
    write_inputs(load_params(stage._params))
    hashed: list[Path] = []
    monkeypatch.setattr(hashes, "hash_file", lambda file: hashed.append(file) or "ab" * 32)
    assert stage.made()
    assert stage.text not in hashed


def test_a_damaged_memory_of_hashes_is_not_believed(stage: Stage) -> None:
    stage.text.write_text(stage.text.read_text().replace("Note", "Page"))
    stage.seen.write_text("{")
    assert stage.made()


def test_parameters_tokenizer_and_the_flag(stage: Stage) -> None:
    assert stage.made("--set", "corpus.row_length=16")
    assert stage.made("--set", "corpus.row_length=32")
    assert not stage.made("--set", "corpus.hub.id=another/one")  # of a source that is not read
    tokenizer = stage.teacher / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace("{", "{ ", 1))
    assert stage.made()
    assert stage.made("--overwrite")


def test_a_corpus_that_was_not_finished_is_made(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the splits and source.json, over another corpus in its place."""

    def is_killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_made_from", is_killed)
    done = CliRunner().invoke(
        main, ["--params", str(stage._params), "--set", "corpus.row_length=16"]
    )
    assert done.exit_code == 130
    monkeypatch.undo()
    assert CorpusSplit(stage.corpus, "train").info.row_length == 16
    assert stage.made()
    assert CorpusSplit(stage.corpus, "train").info.row_length == 32


def test_a_dataset_is_the_commit_of_its_revision(
    tiny_params: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    params = change(tiny_params, corpus={"source": "hub"}).corpus
    text = made_from(params, tiny_params.paths.teacher, tmp_path)["text"]
    assert text["sha256"] == params.hub.revision  # 40 digits: nobody is asked
    branch = params.model_copy(update={"hub": params.hub.model_copy(update={"revision": "main"})})
    monkeypatch.setattr(module, "commit_of", lambda *names, **about: "a commit")
    text = made_from(branch, tiny_params.paths.teacher, tmp_path)["text"]
    assert text["sha256"] == "a commit"

    def unreachable(*names: str, otherwise: str | None, **about: str) -> str:
        if otherwise is None:
            raise DecantError("no route to host")
        return otherwise

    monkeypatch.setattr(module, "commit_of", unreachable)
    assert text_made_from(branch, text, None) == text
    another = params.model_copy(update={"hub": params.hub.model_copy(update={"revision": "v2"})})
    for of, before in ((branch, {}), (another, text)):
        with pytest.raises(DecantError, match="no route"):
            text_made_from(of, before, None)


def test_another_python_has_another_library(
    tiny_params: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    params = change(tiny_params, corpus={"source": "stdlib"}).corpus
    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr(module, "stdlib_files", lambda: [tmp_path / "a.py"])
    before = made_from(params, tiny_params.paths.teacher, tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert made_from(params, tiny_params.paths.teacher, tmp_path) != before


def test_no_text_and_no_corpus(tiny_params: Params, tmp_path: Path) -> None:
    files = {"paths": [str(tmp_path / "absent.txt")], "column": "text"}
    params = change(tiny_params, corpus={"files": files}).corpus
    with pytest.raises(DecantError, match="nothing matches"):
        made_from(params, tiny_params.paths.teacher, tmp_path / "corpus")
    assert read_made_from(tmp_path / "corpus") == {}


def test_sources_of_a_mixture_are_followed(stage: Stage, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(stage.text.read_text().replace("Note", "Page"))

    def mixture(weight: int) -> tuple[str, str]:
        sources = ",".join(
            f"{{source:files,files:{{paths:['{file}']}},weight:{share}}}"
            for file, share in ((stage.text, 1), (other, weight))
        )
        return "--set", f"corpus.sources=[{sources}]"

    assert stage.made(*mixture(2))
    before = stage.sha256()
    assert not stage.made(*mixture(2))
    assert not stage.made(*mixture(2), "--set", "corpus.source=hub")  # is not read
    assert stage.made(*mixture(3))
    assert stage.sha256() != before
    other.write_text(other.read_text().replace("Page", "Sheet"))
    assert stage.made(*mixture(3))
    other.unlink()
    assert not stage.made(*mixture(3))  # text that has gone cannot have changed
    stage.text.write_text(stage.text.read_text().replace("Note", "Leaf"))
    done = CliRunner().invoke(main, ["--params", str(stage._params), *mixture(3)])
    assert done.exit_code == 1
    assert f"nothing matches '{other}'" in done.output
    assert stage.made()  # without the mixture


def test_files_of_all_sources_are_hashed_once(
    tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(hashes, "hash_file", lambda file: read.append(file.name) or file.name)
    sources = []
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("")
        files = {"paths": [str(tmp_path / name)], "column": "text"}
        sources.append({"source": "files", "files": files})
    params = change(tiny_params, corpus={"sources": sources}).corpus
    for _ in range(2):
        found = text_made_from(params, {}, tmp_path / "seen.json")
    assert found["sha256"] == [[[str(tmp_path / n), n]] for n in ("a.jsonl", "b.jsonl")]
    assert read == ["a.jsonl", "b.jsonl"]
