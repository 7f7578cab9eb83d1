"""No stage removes or replaces what Decant did not write, wherever a path points."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.capture.capture import open_captures
from pipeline.config.params import Params
from pipeline.data.corpus import build_corpus
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.errors import MismatchError, ParamsError
from pipeline.export.export import export_model
from pipeline.export.source import find_model
from pipeline.io.folders import LocalFolder
from pipeline.io.ownership import MARK, atomic_folder, claim
from pipeline.teacher.fetch import fetch_teacher
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.run import run_training
from tests.helpers import capture_all, change, open_cache


def put(folder: Path, *names: str) -> dict[str, bytes]:
    """Files of a user's own; returns their contents by name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with atomic_folder(folder, "model", key="paths.runs") as partial:
        (partial / "old").write_text("1")
    with (
        pytest.raises(FileNotFoundError),
        atomic_folder(folder, "model", key="paths.runs") as partial,
    ):
        (partial / "absent").rename(partial / "new")
    assert {entry.name for entry in folder.iterdir()} == {"old", MARK}
    with atomic_folder(folder, "model", key="paths.runs") as partial:
        (partial / "new").write_text("2")
    assert {entry.name for entry in folder.iterdir()} == {"new", MARK}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for number in ("1", "2"):
        with atomic_folder(tmp_path / "link", "teacher", key="paths.teacher") as partial:
            (partial / "file").write_text(number)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "2"


def test_claims_of_two_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sees no mark; before it looks what lies there, the other has marked and filled it."""
    read, seen = LocalFolder.read, []

    def reads_late(folder: LocalFolder, key: str) -> bytes:
        if not seen:
            seen.append(key)
            claim(tmp_path, "logits", key="paths.logits")
            put(tmp_path, "train/zarr.json")
            raise FileNotFoundError(key)
        return read(folder, key)

    monkeypatch.setattr(LocalFolder, "read", reads_late)
    claim(tmp_path, "logits", key="paths.logits")
    assert json.loads((tmp_path / MARK).read_text()) == {"kind": "logits"}


@pytest.mark.parametrize("text", ["{", "null", "[]", '{"kind": []}'])
def test_other_and_damaged_marks_are_refused(text: str, tmp_path: Path) -> None:
    claim(tmp_path, "logits", key="paths.logits")
    with pytest.raises(MismatchError, match=r"other output of Decant's \(logits\), not corpus"):
        claim(tmp_path, "corpus", key="paths.corpus")
    (tmp_path / MARK).write_text(text)
    with pytest.raises(MismatchError, match="other output of Decant's"):
        claim(tmp_path, "logits", key="paths.logits")


@pytest.mark.parametrize("name", ["llama", "download.partial/file", "empty/"])
def test_links_empty_folders_and_partial_files_are_the_users(name: str, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    if name == "llama":
        (models / name).symlink_to(tmp_path)
    elif name.endswith("/"):
        (models / name).mkdir()
    else:
        put(models, name)
    with (
        pytest.raises(MismatchError, match="no mark of Decant's"),
        atomic_folder(models, "teacher", key="paths.teacher"),
    ):
        pass
    assert [entry.name for entry in models.iterdir()] == [name.split("/")[0]]


def test_text_at_paths_corpus_is_left_alone(tiny_params: Params, tmp_path: Path) -> None:
    """The text of a user who keeps it in data/train and sets paths.corpus=data."""
    mine = put(tmp_path / "data", "train/a.jsonl", "validation/b.jsonl")
    with pytest.raises(MismatchError, match=r"for example train, .* set paths\.corpus"):
        build_corpus(tiny_params.corpus, tiny_params.paths.teacher, tmp_path / "data")
    assert files(tmp_path / "data") == mine


def test_a_corpus_is_replaced_and_what_lies_beside_it_stays(tiny_corpus: Params) -> None:
    place = tiny_corpus.paths.corpus
    put(place, "notes.txt", "train/notes.txt")
    (place / "train" / "zarr.json").unlink()  # as where the process was killed before its end
    shorter = tiny_corpus.corpus.model_copy(update={"train_tokens": 1000})
    build_corpus(shorter, tiny_corpus.paths.teacher, place)
    assert CorpusSplit(place, "train").info.num_tokens == 1000
    assert len(list(place.rglob("notes.txt"))) == 2


def test_overwrite_of_prepare_removes_a_cache_alone(tiny_cache: Params, tmp_path: Path) -> None:
    other = change(tiny_cache, prepare={"k": 5})
    mine = put(tmp_path / "data", "train/zarr.json", "a.txt")
    elsewhere = change(tiny_cache, paths={"logits": str(tmp_path / "data")})
    with pytest.raises(MismatchError, match="no mark of Decant's"):
        open_captures(elsewhere, overwrite=True)
    assert files(tmp_path / "data") == mine
    over_corpus = change(tiny_cache, paths={"logits": str(tiny_cache.paths.corpus)})
    with pytest.raises(MismatchError, match=r"\(corpus\), not logits"):
        open_captures(over_corpus, overwrite=True)
    assert len(CorpusSplit(tiny_cache.paths.corpus, "train"))
    put(tiny_cache.paths.logits, "notes.txt", "train/notes.txt")
    for capture in open_captures(other, overwrite=True):
        assert len(capture.writer.missing()) == capture.writer.layout.num_shards
    capture_all(other)
    assert open_cache(other).fingerprint.k == 5
    assert len(list(tiny_cache.paths.logits.rglob("notes.txt"))) == 2


def test_overwrite_keeps_a_split_that_is_the_same(tiny_cache: Params) -> None:
    shorter = tiny_cache.corpus.model_copy(update={"validation_tokens": 300})
    build_corpus(shorter, tiny_cache.paths.teacher, tiny_cache.paths.corpus)
    train, validation = open_captures(tiny_cache, overwrite=True)
    assert train.writer.missing() == []
    assert len(validation.writer.missing()) == validation.writer.layout.num_shards


def test_a_teacher_in_the_place_of_its_pointer_is_left_alone(
    tiny_params: Params, teacher_folder: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(teacher_folder, tmp_path / "teacher")
    claim(tmp_path / "marked", "teacher", key="paths.teacher")
    shutil.copy(tmp_path / "marked" / MARK, place / MARK)
    before = files(place)
    section = {"source": "folder", "folder": {"path": str(place)}}
    with pytest.raises(ParamsError, match=r"lies in paths\.teacher"):
        fetch_teacher(change(tiny_params, teacher=section).teacher, place)
    assert files(place) == before


def test_overwrite_removes_a_cache_through_a_link(tiny_cache: Params, tmp_path: Path) -> None:
    disk = tiny_cache.paths.logits.rename(tmp_path / "disk")
    tiny_cache.paths.logits.symlink_to(disk)
    open_captures(change(tiny_cache, prepare={"k": 5}), overwrite=True)
    assert tiny_cache.paths.logits.is_symlink()


@pytest.mark.parametrize("names", [("config.json", "notes.txt"), ("llama/config.json",)])
def test_fetch_replaces_a_fetched_teacher_alone(
    names: tuple[str, ...], tiny_params: Params, teacher_folder: Path, tmp_path: Path
) -> None:
    mine = put(tmp_path / "models", *names)
    with pytest.raises(MismatchError, match=r"set paths\.teacher to another place"):
        fetch_teacher(tiny_params.teacher, tmp_path / "models")
    assert files(tmp_path / "models") == mine
    for _ in range(2):
        fetch_teacher(tiny_params.teacher, tmp_path / "teacher")
    assert json.loads((tmp_path / "teacher" / MARK).read_text())["kind"] == "teacher"
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    fetch_teacher(tiny_params.teacher, tmp_path / "link")
    assert json.loads((tmp_path / "disk" / MARK).read_text())["kind"] == "teacher"
    before = files(teacher_folder)
    with pytest.raises(ParamsError, match=r"set paths\.teacher to another place"):
        fetch_teacher(tiny_params.teacher, teacher_folder)  # its own source
    assert files(teacher_folder) == before


def test_overwrite_of_train_removes_a_run_alone(tiny_cache: Params) -> None:
    folder = tiny_cache.paths.runs / "mine"
    mine = put(folder, "model/config.json", "notes.txt")
    with pytest.raises(MismatchError, match="no mark of Decant's"):
        run_training(tiny_cache, "mine", overwrite=True)
    assert files(folder) == mine
    shutil.rmtree(folder / "model")
    run_training(tiny_cache, "mine")
    run_training(change(tiny_cache, train={"steps": 4}), "mine", overwrite=True)
    assert (folder / "notes.txt").exists()
    assert json.loads((folder / "run.json").read_text())["train"]["steps"] == 4


def test_checkpoints_elsewhere_are_claimed(tiny_cache: Params, tmp_path: Path) -> None:
    mine = put(tmp_path / "mine" / "student", "step_1000/model.pt", "step_00000002/model.pt")
    params = change(tiny_cache, paths={"checkpoints": str(tmp_path / "mine")})
    with pytest.raises(MismatchError, match=r"set paths\.checkpoints to another place"):
        run_training(params, "student")
    assert files(tmp_path / "mine" / "student") == mine


def test_checkpoints_go_and_what_lies_beside_them_stays(tmp_path: Path) -> None:
    mine = put(tmp_path / "checkpoints", "notes.txt", "archive/step_1.txt", "step_10/model.pt")
    put(tmp_path / "checkpoints", "run.json", "step_00000002/complete.json", MARK)
    put(tmp_path / "checkpoints", "step_00000004.partial/state.json", ".run.json.1.partial")
    Checkpoints(tmp_path / "checkpoints").remove()
    assert files(tmp_path / "checkpoints") == mine


def test_export_replaces_an_export_alone(tiny_cache: Params) -> None:
    params = change(tiny_cache, export={"gguf": []})
    run_training(params, "student")
    found = find_model(params, "student", None)
    mine = put(params.paths.export / "student", "weights.txt")
    with pytest.raises(MismatchError, match=r"set paths\.export to another place"):
        export_model(params, found)
    assert files(params.paths.export / "student") == mine
    shutil.rmtree(params.paths.export / "student")
    for _ in range(2):
        export_model(params, found)
