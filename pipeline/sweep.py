"""Runs side by side: what differs between them, and what came of it.

Two kinds of runs are compared: the finished ones under paths.runs, which stages/train.py made
(`run.json` says from what), and DVC's experiments over the current commit, as `dvc exp show` lists
them, each by its student. Only parameters that differ between the runs at hand are shown. Losses
are those of training's last validation, on the first train.eval_rows rows, which every run has; KL
and agreement over the whole vocabulary are there for the runs that stages/evaluate.py has judged as
they are now, by the hash of their weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import Paths
from pipeline.errors import DecantError
from pipeline.figures import SERIES, draw_svg
from pipeline.files import read_json_object

_SECTIONS = ("seed", "student", "train")
OF_A_TEACHER = (  # idle with train.teacher=none
    "train.alpha",
    "train.alpha_end",
    "train.divergence",
    "train.temperature",
    "train.k",
)
_FIGURES = 6
_NAMED = 16  # runs up to which each point bears its run's name
_LABEL = 18  # characters of a word under an axis
_LOGARITHMIC = 8.0  # ratio of largest to smallest value from which the axis is


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One finished run."""

    name: str
    params: dict[str, Any]  # by dotted key: seed, student.*, train.* and the corpus's hash
    loss: float  # validation cross-entropy, nats
    kl_to_cache: float | None  # validation tail-bucket KL at temperature 1, nats; None: no teacher
    kl_to_teacher: float | None = None  # over the whole vocabulary; None: not judged
    top1_agreement: float | None = None


_RESULTS = {
    "loss": "validation loss",
    "kl_to_cache": "KL to cache",
    "kl_to_teacher": "KL to teacher",
    "top1_agreement": "top-1 agreement",
}


def folder_runs(paths: Paths) -> list[SweepRun]:
    """The finished runs under paths.runs."""
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
    """The students of DVC's finished experiments over the current commit.

    Raises:
        DecantError: the working folder is no DVC project, or DVC cannot list them.
    """
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise DecantError(f"`dvc exp show` failed ({reason}): run it in the project's folder")
    return experiments_of(json.loads(done.stdout), paths)


def experiments_of(shown: Sequence[Mapping[str, Any]], paths: Paths) -> list[SweepRun]:
    """Runs out of what `dvc exp show --json` prints; queued, failed and half-made ones left out."""
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
        params = _flat({key: values.get(key) for key in _SECTIONS})
        judged = _data(data["metrics"].get(evaluated)).get("student", {})
        runs.append(_run(experiment["name"], params, metrics, judged))
    return runs


def varied_keys(runs: Sequence[SweepRun]) -> list[str]:
    """Parameters of which two of the runs have different values, in the order of params.yaml."""
    keys = dict.fromkeys(key for run in runs for key in run.params)
    return [key for key in keys if len({_text(value) for value in _values(runs, key)}) > 1]


def sweep_rows(runs: Sequence[SweepRun]) -> list[dict[str, str]]:
    """The table: a row a run, by rising validation loss; columns by title, the same in each."""
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
    """The table in Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---|" + "---:|" * (len(rows[0]) - 1)]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    return "\n".join(lines)


def sweep_figures(runs: Sequence[SweepRun]) -> dict[str, str]:
    """Validation loss against each parameter that differs: {key: SVG}, the first few keys.

    A line joins the runs that differ in nothing but that parameter.
    """
    keys = varied_keys(runs)
    return {key: _figure(runs, key, [k for k in keys if k != key]) for key in keys[:_FIGURES]}


def sweep_scatter(runs: Sequence[SweepRun]) -> str:
    """Validation loss against distance from the teacher, a point a run: SVG, or nothing to see.

    The distance is the KL to the teacher where all runs that have one were judged, else to the
    cache.
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
    """Where values stand on an axis, by their text, and whether that is a number.

    Numbers stand where they are, lists at their length; where that does not tell all values apart
    (words, null, lists of one length), they stand side by side.
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
    if judged.get("model_sha256") != metrics.get("model_sha256"):
        judged = {}  # of what the run was before it was trained again
    if params.get("train.teacher") == "none":
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
    """Nested sections by dotted keys; a section that may be null leaves its own key too."""
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
    """The content of a file in DVC's listing; empty where it is missing or could not be read."""
    content = (file or {}).get("data")
    return content if isinstance(content, dict) else {}
