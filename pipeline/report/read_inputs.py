"""Read and check the content of the page, from the files of the other stages.

A file that a stage always writes must exist. Results of optional ones (the harness, HumanEval, the
check of an export, the passage) are omitted from the page if the file is missing. A file that
exists but cannot be read is an error, never an empty section.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.config.params import Params, Paths
from pipeline.errors import DecantError
from pipeline.evaluation.results import (
    TEACHER,
    CalibrationBin,
    HarnessResults,
    HumanEvalScores,
    ModelScores,
    Passage,
    Samples,
)
from pipeline.export.check_result import ExportCheck
from pipeline.model.named_models import is_of_run
from pipeline.runtime.console import say
from pipeline.verify.gate_report import GateReport, HistogramBin

Content = TypeVar("Content")
Measured = TypeVar("Measured", ModelScores, HumanEvalScores, ExportCheck)
_AllScores = Annotated[dict[str, ModelScores], Field(min_length=1)]
_OBJECTIVE = {
    f"train.{key}" for key in ("targets", "alpha", "alpha_end", "divergence", "temperature", "k")
}
"""Parameters in which a distilled run and a baseline are meant to differ."""
Curve = tuple[list[float], list[float]]
"""Optimizer steps, and the value at each step."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All results found; None if a result does not exist."""

    scores: dict[str, ModelScores]
    samples: Samples
    calibration: list[CalibrationBin]
    gate: GateReport
    histogram: list[HistogramBin]
    curves: dict[str, dict[str, Curve]]  # by run and metric
    passage: Passage | None
    lm_eval: dict[str, HarnessResults] | None
    humaneval: dict[str, HumanEvalScores] | None
    export: ExportCheck | None


def read_inputs(paths: Paths) -> Inputs:
    """Read all results.

    Raises:
        DecantError: a required stage has not run (the message names it), or one of its files
            cannot be read.
    """
    evaluate, verify = paths.evaluate, paths.verify
    judged = _all_scores(paths)
    scores = _scores_of_today(paths, judged)
    samples: Samples = _read(evaluate / "samples.json", Samples, "evaluate")
    passage: Passage | None = _if_there(evaluate / "passage.json", Passage, "evaluate")
    points = _read(evaluate / "calibration.json", list[CalibrationBin], "evaluate")
    harness = _if_there(evaluate / "lm_eval.json", dict[str, HarnessResults], "evaluate")
    file = paths.humaneval / "metrics.json"
    all_humaneval = _if_there(file, dict[str, HumanEvalScores], "humaneval") or {}
    humaneval = _of_today(paths, all_humaneval)
    check: ExportCheck | None = _if_there(paths.export / "check.json", ExportCheck, "export")
    exports = {check.model: check} if check else {}
    export = _of_today(paths, exports)
    of_before = {
        "evaluate": judged.keys() - scores.keys(),
        "humaneval": all_humaneval.keys() - humaneval.keys(),
        "export": exports.keys() - export.keys(),
    }
    for stage, names in of_before.items():
        for name in sorted(names):
            say(f"  {name} has been trained again: run stages/{stage}.py again to have it here")
    old = of_before["evaluate"]
    return Inputs(
        scores=scores,
        samples=replace(samples, continuations=_less(old, samples.continuations)),
        calibration=[point for point in points if point.model not in old],
        gate=_read(verify / "metrics.json", GateReport, "verify"),
        histogram=_read(verify / "histogram.json", list[HistogramBin], "verify"),
        curves=_curves_of(paths.runs, scores),
        passage=passage and replace(passage, models=_less(old, passage.models)),
        lm_eval=harness and _less(old, harness),
        humaneval=humaneval or None,
        export=next(iter(export.values()), None),
    )


def _less(names: Collection[str], found: Mapping[str, Content]) -> dict[str, Content]:
    return {name: result for name, result in found.items() if name not in names}


def read_scores(paths: Paths) -> dict[str, ModelScores]:
    """Read the comparison of models, by name, without runs that have been trained again since.

    Raises:
        DecantError: see `read_inputs`; or all runs have been trained again since.
    """
    return _scores_of_today(paths, _all_scores(paths))


def _scores_of_today(paths: Paths, scores: Mapping[str, ModelScores]) -> dict[str, ModelScores]:
    found = _of_today(paths, scores)
    if len(scores) > 1 and not found.keys() - {TEACHER}:
        raise DecantError(
            f"{paths.evaluate / 'metrics.json'} tells of runs that have been trained again since: "
            "run stages/evaluate.py again"
        )
    return found


def _all_scores(paths: Paths) -> dict[str, ModelScores]:
    found: dict[str, ModelScores] = _read(paths.evaluate / "metrics.json", _AllScores, "evaluate")
    return found


def _of_today(paths: Paths, found: Mapping[str, Measured]) -> dict[str, Measured]:
    """Keep the results that were measured on the model that the run's folder holds now."""
    return {
        name: result
        for name, result in found.items()
        if name == TEACHER or is_of_run(paths.runs, name, result.model_sha256)
    }


def differences(paths: Paths, one: str | None, other: str) -> list[str]:
    """Return the inputs in which two runs differ, except the objective; keys as in params.yaml.

    The list is also empty if either is not a run or has no run.json.

    Raises:
        DecantError: a run.json cannot be read.
    """
    files = [paths.runs / run / "run.json" for run in (one or "", other)]
    if not all(file.exists() for file in files):
        return []
    first, second = (_flat(_read(file, dict[str, Any], "train")) for file in files)
    shared = [key for key in first if key in second and key not in _OBJECTIVE]
    return [key for key in shared if first[key] != second[key]]


def _flat(said: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the sections of run.json: {"train.steps": 48, ...}."""
    flat: dict[str, Any] = {}
    for name, value in said.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}.{part}" if part else name: inner for part, inner in parts}
    return flat


def params_of_run(params: Params, run: str | None) -> Params:
    """Return `params` with the values of a run's run.json, or unchanged if it is not a run.

    Raises:
        DecantError: run.json cannot be read.
    """
    file = params.paths.runs / run / "run.json" if run else None
    if file is None or not file.exists():
        return params
    said: dict[str, Any] = _read(file, dict[str, Any], "train")
    values = params.model_dump()
    try:
        for section in ("student", "train"):
            values[section] |= said.get(section, {})
        return Params.model_validate(values)
    except (TypeError, ValueError):
        raise DecantError(
            f"{file} cannot be read (its parameters are not those of a run): run stages/train.py "
            "again"
        ) from None


def read_curves(folder: Path) -> dict[str, Curve]:
    """Read DVCLive's TSV files below a folder as {metric: (steps, values)}."""
    curves = {}
    for file in sorted(folder.rglob("*.tsv")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        try:
            with file.open() as stream:
                rows = list(csv.DictReader(stream, delimiter="\t"))
            values = [float(row[file.stem]) for row in rows]
            curves[name] = ([float(row["step"]) for row in rows], values)
        except (KeyError, TypeError, ValueError, csv.Error):
            raise DecantError(
                f"{file} cannot be read (no table of steps and numbers): run stages/train.py again"
            ) from None
    if not curves:
        raise DecantError(f"{folder} holds no curves: run stages/train.py first")
    return curves


def _curves_of(runs: Path, scores: Mapping[str, ModelScores]) -> dict[str, dict[str, Curve]]:
    """Read the curves of the models that are runs; models judged by folder have none."""
    return {
        name: read_curves(runs / name / "dvclive" / "plots" / "metrics")
        for name in scores
        if name != TEACHER and (runs / name).is_dir()
    }


def _if_there(file: Path, kind: type[Content], stage: str) -> Content | None:
    return _read(file, kind, stage) if file.exists() else None


def _read(file: Path, kind: Any, stage: str) -> Any:
    """Parse the file's JSON as `kind`."""
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes())
    except FileNotFoundError:
        raise DecantError(
            f"{file} cannot be read (it does not exist): run stages/{stage}.py first"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise DecantError(
            f"{file} cannot be read ({where + ': ' if where else ''}{reason}): run "
            f"stages/{stage}.py again"
        ) from None
