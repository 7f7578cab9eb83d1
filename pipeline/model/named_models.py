"""Models named by a stage's flags: `--run NAME` under paths.runs, `--model NAME=FOLDER`.

A name becomes the name of a folder: of the run, or of the output about the model. Therefore all
stages require a single word, since a path could lead outside the place where the name is looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.params import Paths
from pipeline.errors import DecantError, ParamsError
from pipeline.io.ownership import MARK, find_damage
from pipeline.model.folder import hash_weights, teacher_folder


def run_folder(runs: Path, name: str) -> Path:
    """Return the folder of a run, which need not exist.

    Raises:
        ParamsError: the name cannot be the name of one folder in `runs`.
    """
    if not _is_one_word(name):
        raise ParamsError(f"--run {name!r} is not the name of one folder in {runs}: give a word")
    return runs / name


def model_folder(runs: Path, run: str, model: Path | None = None) -> Path:
    """Return the folder that --model gives, or else the model of a run.

    Raises:
        ParamsError: see run_folder.
        DecantError: there is no model, or it is damaged.
    """
    if model is not None:
        return _require_model(
            model, "name a model folder by --model", "make it again by the stage that wrote it"
        )
    command = f"run stages/train.py --run {run}"
    return _require_model(run_folder(runs, run) / "model", f"{command} first", f"{command} again")


def teacher_model(folder: Path) -> Path:
    """Return the folder of the teacher at paths.teacher.

    Raises:
        DecantError: there is no teacher, or it is damaged.
    """
    command = "run stages/fetch.py"
    return _require_model(teacher_folder(folder), f"{command} first", f"{command} again")


def is_of_run(runs: Path, name: str, model_sha256: object) -> bool:
    """Return whether a result was measured on the run's current model.

    The hash of the model that was measured decides. The result is also True if no run of that name
    has a model, since then another folder was measured.
    """
    model = runs / name / "model"
    is_run = _is_one_word(name) and (model / "config.json").exists()
    return not is_run or hash_weights(model) == model_sha256


def _require_model(folder: Path, remedy: str, repair: str) -> Path:
    """Return the folder, after checking that its files are as the stage that wrote them left them.

    Args:
        remedy: what to do if the model is missing.
        repair: what to do if the model is damaged.

    Raises:
        DecantError: the folder has no config.json, which every model folder has, or is damaged.
    """
    if not (folder / "config.json").is_file():
        raise DecantError(f"{folder} holds no config.json: {remedy}")
    if damage := find_damage(folder):
        raise DecantError(
            f"{folder} is not what was written there ({damage}): {repair}, or, if the change is "
            f"yours, copy the folder without {MARK} and name the copy"
        )
    return folder


def name_models(
    paths: Paths, runs: Sequence[str], models: Sequence[str], *, teacher: str | None = None
) -> dict[str, Path]:
    """Return model folders by name: the teacher if requested, then runs, then other folders.

    Args:
        runs: values of --run.
        models: values of --model, NAME=FOLDER.
        teacher: name for the model at paths.teacher; None leaves it out.

    Raises:
        ParamsError: a value has another form, or a name occurs twice.
        DecantError: a folder does not contain a model.
    """
    given = [_parse(text) for text in models]
    names = [run_folder(paths.runs, name).name for name in runs] + [name for name, _ in given]
    names += [teacher] if teacher else []
    for name in names:
        if names.count(name) > 1:
            raise ParamsError(f"two models are called {name}: give each a name of its own")
    found = {teacher: teacher_model(paths.teacher)} if teacher else {}
    found |= {name: model_folder(paths.runs, name) for name in runs}
    return found | {name: model_folder(paths.runs, name, folder) for name, folder in given}


def _parse(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder or not _is_one_word(name):
        raise ParamsError(
            f"--model {text!r} is not of the form NAME=FOLDER with a word for a name: give both"
        )
    return name, Path(folder)


def _is_one_word(name: str) -> bool:
    """Return whether a name stays inside its folder: it is no path, nor the folder itself."""
    return name not in ("", ".", "..") and "/" not in name
