"""Compare runs: the parameters in which they differ, and their results.

Two kinds of runs are compared: the finished runs under paths.runs, made by stages/train.py
(`run.json` records their inputs), and DVC's experiments on the current commit, as listed by `dvc
exp show`, each represented by its student. Only parameters that differ between these runs are
shown. Losses come from training's last validation, on the first train.eval_rows rows, which every
run has. KL and agreement over the whole vocabulary are available for runs that stages/evaluate.py
has evaluated in their present state, identified by the hash of their weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.params import Paths
from pipeline.errors import DecantError
from pipeline.io.files import read_json_object
from pipeline.runtime.figures import SERIES, draw_svg
from pipeline.runtime.markdown import markdown_table

_SECTIONS = ("seed", "student", "train")
OF_A_TEACHER = (  # without effect if train.targets=none
    "train.alpha",
    "train.alpha_end",
    "train.divergence",
    "train.temperature",
    "train.k",
)
_FIGURES = 6
_NAMED = 16  # maximum number of runs at which points are labelled with the run's name
_LABEL = 18  # maximum characters of a label under an axis
_LOGARITHMIC = 8.0  # ratio of largest to smallest value from which an axis is logarithmic


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One finished run."""

    name: str
    params: dict[str, Any]  # by dotted key: seed, student.*, train.* and the corpus's hash
    loss: float  # validation cross-entropy, nats
    kl_to_cache: float | None  # validation tail-bucket KL at temperature 1, nats; None: no teacher
    kl_to_teacher: float | None = None  # over the whole vocabulary; None: not evaluated
    top1_agreement: float | None = None


_RESULTS = {
    "loss": "validation loss",
    "kl_to_cache": "KL to cache",
    "kl_to_teacher": "KL to teacher",
    "top1_agreement": "top-1 agreement",
}


def folder_runs(paths: Paths) -> list[SweepRun]:
    """Read the finished runs under paths.runs."""
    judged = read_json_object(paths.evaluate / "metrics.json")
    runs = []
    for folder in sorted(paths.runs.glob("*/")):
        identity = read_json_object(folder / "run.json")
        metrics = read_json_object(folder / "dvclive" / "metrics.json")
        if not identity or not metrics or not (folder / "model").exists():
            continue
        params = _flat({key: identity.get(key) for key in _SECTIONS})
        params["corpus"] = str(identity.get("corpus_sha256"))[:8]
        try:
            runs.append(_run(folder.name, params, metrics, judged.get(folder.name, {})))
        except (KeyError, TypeError, AttributeError):
            raise DecantError(
                f"{folder / 'dvclive' / 'metrics.json'} holds no validation loss: train the run "
                f"again by stages/train.py --run {folder.name} --overwrite, or remove it"
            ) from None
    return runs


def dvc_experiments(paths: Paths) -> list[SweepRun]:
    """Read the students of DVC's finished experiments on the current commit.

    Raises:
        DecantError: the working folder is not a DVC project, or DVC cannot list experiments.
    """
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise DecantError(f"`dvc exp show` failed ({reason}): run it in the project's folder")
    return experiments_of(json.loads(done.stdout), paths)


def experiments_of(shown: Sequence[Mapping[str, Any]], paths: Paths) -> list[SweepRun]:
    """Parse the runs in the output of `dvc exp show --json`; skip those that did not finish."""
    trained = os.path.relpath(paths.runs / "student" / "dvclive" / "metrics.json")
    evaluated = os.path.relpath(paths.evaluate / "metrics.json")
    runs = []
    for experiment in (e for commit in shown for e in commit.get("experiments") or ()):
        state = (experiment.get("executor") or {}).get("state", "success")
        data = experiment["revs"][0].get("data")
        if state != "success" or not data:
            continue
        files = [_data(file) for file in data["params"].values()]
        values = next((file for file in files if "train" in file), None)
        metrics = _data(data["metrics"].get(trained))
        if values is None or not metrics:
            continue
        flat = _flat({key: values.get(key) for key in _SECTIONS})
        # What `auto` became is in run.json, which DVC does not list, so it says of no difference.
        params = {key: value for key, value in flat.items() if value != "auto"}
        judged = _data(data["metrics"].get(evaluated)).get("student", {})
        runs.append(_run(experiment["name"], params, metrics, judged))
    return runs


def varied_keys(runs: Sequence[SweepRun]) -> list[str]:
    """List the parameters with different values in two of the runs, in the order of params.yaml."""
    keys = dict.fromkeys(key for run in runs for key in run.params)
    return [key for key in keys if len({_text(value) for value in _values(runs, key)}) > 1]


def sweep_rows(runs: Sequence[SweepRun]) -> list[dict[str, str]]:
    """Return a table of one row per run, by ascending validation loss, with the same columns."""
    keys = varied_keys(runs)
    return [
        {
            "run": run.name,
            **{key: _text(run.params[key]) if key in run.params else "" for key in keys},
            **{title: _number(getattr(run, name)) for name, title in _RESULTS.items()},
        }
        for run in sorted(runs, key=lambda run: run.loss)
    ]


def sweep_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Format the table as Markdown."""
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows], numbers=True)


def sweep_figures(runs: Sequence[SweepRun]) -> dict[str, str]:
    """Plot validation loss against each of the first few differing parameters: {key: SVG}.

    A line joins runs that differ only in that parameter.
    """
    keys = varied_keys(runs)
    return {key: _figure(runs, key, [k for k in keys if k != key]) for key in keys[:_FIGURES]}


def sweep_scatter(runs: Sequence[SweepRun]) -> str:
    """Plot validation loss against distance from the teacher, one point per run, as SVG.

    The distance is the KL to the teacher if all runs with a teacher were evaluated, else the KL to
    the cache. The result is empty if fewer than two runs have a teacher.
    """
    taught = [run for run in runs if run.kl_to_cache is not None]
    judged = all(run.kl_to_teacher is not None for run in taught)
    name = "kl_to_teacher" if judged else "kl_to_cache"
    if len(taught) < 2:
        return ""

    def draw(axes: Any) -> None:
        for run in taught:
            place = (getattr(run, name), run.loss)
            axes.plot(*place, "o", ms=5, color=SERIES[0])
            if len(taught) <= _NAMED:
                axes.annotate(run.name, place, (5, 3), textcoords="offset points", fontsize=7)
        axes.margins(0.15)
        axes.set_xlabel(_RESULTS[name] + ", nats")
        axes.set_ylabel(_RESULTS["loss"] + ", nats")

    return draw_svg([draw], alt=f"Validation loss against {_RESULTS[name]} of {len(taught)} runs")


def _figure(runs: Sequence[SweepRun], key: str, others: Sequence[str]) -> str:
    lines: dict[str, list[SweepRun]] = {}
    for run in runs:
        if key in run.params:
            same = ", ".join(f"{k} {_text(run.params[k])}" for k in others if k in run.params)
            lines.setdefault(same, []).append(run)
    places, are_numbers = _places(_values(runs, key))

    def draw(axes: Any) -> None:
        for line in lines.values():
            points = sorted((places[_text(run.params[key])], run.loss, run.name) for run in line)
            x, y, names = zip(*points, strict=True)
            axes.plot(x, y, "o-", ms=4, linewidth=1.4)
            for place in zip(names, x, y, strict=True) if len(runs) <= _NAMED else ():
                axes.annotate(place[0], place[1:], (4, 3), textcoords="offset points", fontsize=7)
        axes.margins(0.15)
        if not are_numbers:
            axes.set_xticks(list(places.values()), [_short(text) for text in places])
        elif max(places.values()) >= _LOGARITHMIC * min(places.values()) > 0.0:
            axes.set_xscale("log")
        axes.set_xlabel(key)
        axes.set_ylabel(_RESULTS["loss"] + ", nats")

    return draw_svg([draw], alt=f"Validation loss of {len(runs)} runs by {key}")


def _places(values: Iterable[Any]) -> tuple[dict[str, float], bool]:
    """Return the positions of values on an axis, by their text, and whether they are numbers.

    Numbers are placed at their value and lists at their length. If that does not distinguish all
    values (words, null, lists of equal length), they are placed side by side.
    """
    distinct = {_text(value): value for value in values}
    sizes = {
        text: float(len(value)) if isinstance(value, list) else value
        for text, value in distinct.items()
    }
    numbers = {n for n in sizes.values() if isinstance(n, int | float) and not isinstance(n, bool)}
    if len(numbers) == len(distinct):
        return {text: float(size) for text, size in sizes.items()}, True
    return {text: float(place) for place, text in enumerate(sorted(distinct))}, False


def _run(
    name: str, params: dict[str, Any], metrics: Mapping[str, Any], judged: Mapping[str, Any]
) -> SweepRun:
    is_of = judged.get("model_sha256")
    if is_of is None or is_of != metrics.get("model_sha256"):
        judged = {}  # the evaluation is from before the run was trained again
    if params.get("train.targets") == "none":
        params = {key: value for key, value in params.items() if key not in OF_A_TEACHER}
    return SweepRun(
        name=name,
        params=params,
        loss=metrics["validation"]["loss"],
        kl_to_cache=metrics["validation"].get("kl"),
        kl_to_teacher=judged.get("kl_to_teacher"),
        top1_agreement=judged.get("top1_agreement"),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted keys; a section that may be null also keeps its own key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            if prefix:
                flat[prefix + key] = "given"
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _values(runs: Iterable[SweepRun], key: str) -> list[Any]:
    return [run.params[key] for run in runs if key in run.params]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)}: {', '.join(map(_text, value))}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.6g}"
    return "null" if value is None else str(value)


def _short(text: str) -> str:
    return text if len(text) <= _LABEL else f"{text[:_LABEL]}..."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _data(file: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a file's content from DVC's listing; empty if it is missing or could not be read."""
    content = (file or {}).get("data")
    return content if isinstance(content, dict) else {}
