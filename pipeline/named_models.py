"""Models as a stage's flags name them: `--run NAME` under paths.runs, `--model NAME=FOLDER`.

A name becomes a folder's: of the run, or of what is written about the model. So it is one word, by
one rule in all stages: a path could lead out of the place where the name is looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Paths
from pipeline.errors import DecantError, ParamsError
from pipeline.model.folder import hash_weights, teacher_folder
from pipeline.storage import MARK, find_damage


def run_folder(runs: Path, name: str) -> Path:
    """The folder of a run, there or not.

    Raises:
        ParamsError: the name is no folder's in `runs`.
    """
    if not _is_one_word(name):
        raise ParamsError(f"--run {name!r} is not the name of one folder in {runs}: give a word")
    return runs / name


def run_model(runs: Path, name: str) -> Path:
    """The model folder of a run.

    Raises:
        ParamsError: as run_folder.
        DecantError: the run has left no model.
    """
    command = f"run stages/train.py --run {name}"
    return require_model(run_folder(runs, name) / "model", f"{command} first", f"{command} again")


def is_of_run(runs: Path, name: str, model_sha256: object) -> bool:
    """Whether a result, by the hash of the model it was measured on, is of the run's model now.

    True, too, where no run of that name has a model: then another folder was measured.
    """
    model = runs / name / "model"
    is_run = _is_one_word(name) and (model / "config.json").exists()
    return not is_run or hash_weights(model) == model_sha256


def require_model(
    folder: Path,
    remedy: str = "name a model folder by --model",
    repair: str = "make it again by the stage that wrote it",
) -> Path:
    """The folder, each of its files as the stage that wrote it left it.

    Args:
        remedy, repair: what to do about an absent one, and a damaged one.

    Raises:
        DecantError: it holds no config.json, as every model folder does, or is damaged.
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
    """Model folders by name: the teacher if it is among them, runs, then other folders.

    Args:
        runs: values of --run. models: of --model, NAME=FOLDER.
        teacher: what paths.teacher is called, if it is among them.

    Raises:
        ParamsError: a value of another form, or a name twice.
        DecantError: a folder that holds no model.
    """
    given = [_parse(text) for text in models]
    names = [run_folder(paths.runs, name).name for name in runs] + [name for name, _ in given]
    names += [teacher] if teacher else []
    for name in names:
        if names.count(name) > 1:
            raise ParamsError(f"two models are called {name}: give each a name of its own")
    found = {}
    if teacher:
        found[teacher] = require_model(
            teacher_folder(paths.teacher), "run stages/fetch.py first", "run stages/fetch.py again"
        )
    found |= {name: run_model(paths.runs, name) for name in runs}
    return found | {name: require_model(folder) for name, folder in given}


def _parse(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder or not _is_one_word(name):
        raise ParamsError(
            f"--model {text!r} is not of the form NAME=FOLDER with a word for a name: give both"
        )
    return name, Path(folder)


def _is_one_word(name: str) -> bool:
    """Whether a name stays in the folder that it is looked up in: no path, not that folder."""
    return name not in ("", ".", "..") and "/" not in name
