"""What evaluate and humaneval write, as dataclasses; the report reads the same ones back.

    paths.evaluate/metrics.json      {model: ModelScores}
    paths.evaluate/calibration.json  [CalibrationBin]
    paths.evaluate/samples.json      Samples
    paths.evaluate/passage.json      Passage
    paths.evaluate/lm_eval.json      {model: HarnessResults}
    paths.humaneval/metrics.json     {model: HumanEvalScores}

This module imports no torch, so that reading results does not need the code that made them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import FiniteFloat

from pipeline.runtime.bootstrap import Interval

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class KLStatistics:
    """KL(teacher || model) over positions, in nats.

    These are the statistics of llama.cpp's `perplexity --kl-divergence`, with the same linear
    interpolation between positions.
    """

    mean: float
    median: float
    p90: float  # 90 % of the positions are below this value
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one model on the validation rows."""

    loss: float  # cross-entropy of the next token, nats
    perplexity: float  # exp(loss)
    kl_to_teacher: float  # KL(teacher || model) over the whole vocabulary, nats
    top1_agreement: float  # share of positions where the most probable id is the teacher's
    accuracy: float  # share of positions whose most probable id is the next token
    calibration_error: float  # expected calibration error of the most probable id
    tokens: int  # number of positions judged
    kl: KLStatistics
    interval: dict[str, Interval]  # by name of a field above; empty if nothing can be resampled


@dataclass(frozen=True, kw_only=True)
class ModelScores(Scores):
    """Scores of one model, and which model it is."""

    parameters: int
    model_sha256: str  # pipeline/model/folder.py, hash_weights


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """A non-empty bin of a model's reliability diagram."""

    model: str
    confidence: FiniteFloat
    accuracy: FiniteFloat
    share: FiniteFloat  # of all positions


@dataclass(frozen=True)
class Samples:
    """Greedy continuations of prompts, by model."""

    prompts: list[str]
    continuations: dict[str, list[str]]

    def __post_init__(self) -> None:
        if any(len(texts) != len(self.prompts) for texts in self.continuations.values()):
            raise ValueError("a model has not as many continuations as there are prompts")


@dataclass(frozen=True)
class PassageModel:
    """The predictions of a model at each position of a passage except the last."""

    kl: list[float]  # KL from the teacher, nats
    p_next: list[float]  # probability of the token that follows
    top: list[list[tuple[str, float]]]  # its most probable tokens, with probabilities


@dataclass(frozen=True)
class Passage:
    """A text token by token; position i predicts text_tokens[i + 1]."""

    text_tokens: list[str]
    models: dict[str, PassageModel]

    def __post_init__(self) -> None:
        if TEACHER not in self.models:
            raise ValueError("the teacher is not among its models")
        counts = {len(v) for m in self.models.values() for v in (m.kl, m.p_next, m.top)}
        if counts != {len(self.text_tokens) - 1}:
            raise ValueError("its lists are not as long as its text")


@dataclass(frozen=True)
class TaskMetric:
    """A metric of a task of the evaluation harness."""

    value: float
    stderr: float | None  # None if the harness gives none


HarnessResults = dict[str, dict[str, TaskMetric]]
"""A model's metrics by task and name."""


@dataclass(frozen=True, kw_only=True)
class HumanEvalScores:
    """Results of a model's samples for HumanEval's problems, equally many per problem."""

    pass_at: dict[str, float]  # by k, the mean over problems
    interval: Interval  # of pass@1
    problems: int
    samples_per_problem: int
    statuses: dict[str, int]  # number of samples by status
    temperature: float
    tokens_per_second: float
    new_tokens: int  # in all samples
    model_sha256: str
