"""What the page shows, read from the files of the other stages and checked.

A file that a stage always writes must be there. The others (the harness, HumanEval, the check of an
export, the passage) are left out of the page where they are missing. A file that is there and
cannot be read is an error, never an empty section.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from pipeline.config import Paths
from pipeline.errors import DecantError
from pipeline.fidelity import GateSummary

Content = TypeVar("Content")
Curve = tuple[list[float], list[float]]
"""Optimizer steps, and the value at each."""

TEACHER = "teacher"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Interval(_Record):
    """A 95 % confidence interval."""

    low: float
    high: float


class KlStatistics(_Record):
    """KL(teacher || model) over positions, nats: mean, quantiles, largest."""

    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    max: float


class Scores(_Record):
    """A model on the validation rows (paths.evaluate/metrics.json)."""

    loss: float  # nats a token
    perplexity: float
    kl_to_teacher: float  # nats a token
    top1_agreement: float
    accuracy: float
    calibration_error: float
    tokens: int
    parameters: int
    kl: KlStatistics | None = None
    interval: dict[str, Interval] = Field(default_factory=dict)  # by name of a field above


class Samples(_Record):
    """Greedy continuations of prompts, by model."""

    prompts: list[str]
    continuations: dict[str, list[str]]


class Gate(_Record):
    """What verify found (paths.verify/metrics.json)."""

    passed: bool
    batches: int
    tokens: int
    cache: GateSummary
    noise_floor: GateSummary
    negative_control: GateSummary


class GateBar(_Record):
    """A bin of the gate's histogram, by its lower edge."""

    series: str
    log10_one_minus_cosine: float
    share: float


class CalibrationPoint(_Record):
    """A bin of the reliability diagram."""

    model: str
    confidence: float
    accuracy: float


class PassageModel(_Record):
    """What a model said at each position of a passage."""

    kl: list[float]  # from the teacher, nats
    p_next: list[float]  # probability of the token that follows
    top: list[list[tuple[str, float]]]  # its most probable tokens, with probabilities


class Passage(_Record):
    """A text token by token; position i predicts text_tokens[i + 1]."""

    text_tokens: list[str]
    models: dict[str, PassageModel]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if TEACHER not in self.models:
            raise ValueError("the teacher is not among its models")
        counts = {len(v) for m in self.models.values() for v in (m.kl, m.p_next, m.top)}
        if len(counts) != 1 or not 0 <= len(self.text_tokens) - max(counts) <= 1:
            raise ValueError("its lists are not as long as its text")
        return self


class TaskMetric(_Record):
    """A metric of the evaluation harness."""

    value: float | None
    stderr: float | None = None


class HumanEval(_Record):
    """A model's samples for HumanEval's problems, run."""

    pass_at: dict[str, float]  # by k
    interval: Interval | None = None  # of pass@1
    problems: int
    samples_per_problem: int
    temperature: float
    tokens_per_second: float
    new_tokens: int  # of all samples
    statuses: dict[str, int]


class ExportPath(_Record):
    """A program that generated from the exported model, against our own generation."""

    name: str
    tokens: int
    equal_tokens: int
    equal_prompts: int
    required: bool
    passed: bool


class TokenizerPath(_Record):
    """A program's tokenizer on lines of text, against the teacher's."""

    name: str
    lines: int
    equal_lines: int
    passed: bool


class ExportCheck(_Record):
    """The check of an exported model."""

    model: str
    prompts: int
    new_tokens: int
    paths: list[ExportPath]
    tokenizer: list[TokenizerPath]
    left_out: list[str] = Field(default_factory=list)  # programs that are not there, and the remedy

    @property
    def passed(self) -> bool:
        """Whether every path that had to agree did."""
        return all(path.passed for path in self.paths if path.required) and all(
            path.passed for path in self.tokenizer
        )


AllScores = Annotated[dict[str, Scores], Field(min_length=1)]
LmEval = dict[str, dict[str, dict[str, TaskMetric]]]
"""By model, task and metric."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that was found; None: not there."""

    scores: dict[str, Scores]
    samples: Samples
    calibration: list[CalibrationPoint]
    gate: Gate
    histogram: list[GateBar]
    curves: dict[str, dict[str, Curve]]  # by run and metric
    passage: Passage | None
    lm_eval: LmEval | None
    humaneval: dict[str, HumanEval] | None
    export: ExportCheck | None


def read_inputs(paths: Paths) -> Inputs:
    """Read everything.

    Raises:
        DecantError: a stage that the page shows has not run, which is named, or a file of one
            cannot be read.
    """
    scores = read_scores(paths)
    evaluate, verify = paths.evaluate, paths.verify
    samples: Samples = _read(evaluate / "samples.json", Samples, "evaluate")
    return Inputs(
        scores=scores,
        samples=samples,
        calibration=_read(evaluate / "calibration.json", list[CalibrationPoint], "evaluate"),
        gate=_read(verify / "metrics.json", Gate, "verify"),
        histogram=_read(verify / "histogram.json", list[GateBar], "verify"),
        curves=_curves_of(paths.runs, scores),
        passage=_if_there(evaluate / "passage.json", Passage, "evaluate"),
        lm_eval=_if_there(evaluate / "lm_eval.json", LmEval, "evaluate"),
        humaneval=_if_there(paths.humaneval / "metrics.json", dict[str, HumanEval], "humaneval"),
        export=_if_there(paths.export / "check.json", ExportCheck, "export"),
    )


def read_scores(paths: Paths) -> dict[str, Scores]:
    """The comparison of models, by name.

    Raises:
        DecantError: as `read_inputs`.
    """
    scores: dict[str, Scores] = _read(paths.evaluate / "metrics.json", AllScores, "evaluate")
    return scores


def read_curves(folder: Path) -> dict[str, Curve]:
    """DVCLive's TSV files below a folder -> {metric: (steps, values)}."""
    curves = {}
    for file in sorted(folder.rglob("*.tsv")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        try:
            with file.open() as stream:
                rows = list(csv.DictReader(stream, delimiter="\t"))
            values = [float(row[file.stem]) for row in rows]
            curves[name] = ([float(row["step"]) for row in rows], values)
        except (KeyError, TypeError, ValueError):
            raise DecantError(
                f"{file} cannot be read (no table of steps and numbers): run stages/train.py again"
            ) from None
    if not curves:
        raise DecantError(f"{folder} holds no curves: run stages/train.py first")
    return curves


def _curves_of(runs: Path, scores: Mapping[str, Scores]) -> dict[str, dict[str, Curve]]:
    """Curves of the judged models that are runs; others, judged by their folder, have none."""
    return {
        name: read_curves(runs / name / "dvclive" / "plots" / "metrics")
        for name in scores
        if name != TEACHER and (runs / name).is_dir()
    }


def _if_there(file: Path, kind: type[Content], stage: str) -> Content | None:
    return _read(file, kind, stage) if file.exists() else None


def _read(file: Path, kind: Any, stage: str) -> Any:
    """The file's JSON as `kind`."""
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
