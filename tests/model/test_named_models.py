"""--run NAME and --model NAME=FOLDER, as all stages read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.params import Params
from pipeline.errors import DecantError, ParamsError
from pipeline.model.named_models import name_models, run_folder


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_models_come_by_name_teacher_first(tiny_params: Params, tmp_path: Path) -> None:
    paths = tiny_params.paths
    run, other = made(paths.runs / "student" / "model"), made(tmp_path / "a=b")
    found = name_models(paths, ["student"], [f"x={other}"], teacher="teacher")
    assert list(found.items()) == [("teacher", paths.teacher), ("student", run), ("x", other)]
    assert name_models(paths, [], [f"teacher={other}"]) == {"teacher": other}


@pytest.mark.parametrize(
    ("runs", "models", "message"),
    [
        (["a", "a"], [], "two models are called a: give each a name of its own"),
        (["a"], ["a=absent"], "two models are called a"),
        ([], ["teacher=absent"], "two models are called teacher"),
        (["../a"], [], r"--run '../a' is not the name of one folder in .*runs: give a word"),
        (
            [],
            ["=folder"],
            "--model '=folder' is not of the form NAME=FOLDER with a word for a name",
        ),
        ([], ["a="], "--model 'a=' is not of the form NAME=FOLDER"),
        ([], ["a/b=c"], "--model 'a/b=c' is not of the form NAME=FOLDER"),
        (["absent"], [], "model holds no config.json: run stages/train.py --run absent first"),
        ([], ["a=absent"], "absent holds no config.json: name a model folder by --model"),
    ],
)
def test_mistakes(runs: list[str], models: list[str], message: str, tiny_params: Params) -> None:
    kind = DecantError if "holds no config.json" in message else ParamsError
    with pytest.raises(kind, match=message):
        name_models(tiny_params.paths, runs, models, teacher="teacher")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/"])
def test_a_run_is_one_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="is not the name of one folder in"):
        run_folder(tmp_path, name)
