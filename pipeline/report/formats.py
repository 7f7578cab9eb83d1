"""The results of the other stages for the page: their JSON files as typed records.

The files may contain more keys than these; the page does not show them.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

TEACHER = "teacher"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Point(BaseModel):
    """A point of a figure, which must be finite to be drawn."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Interval(_Record):
    """A 95 % confidence interval."""

    low: float
    high: float


class KlStatistics(_Record):
    """KL(teacher || model) over positions, in nats: mean, quantiles, maximum."""

    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    max: float


class Scores(_Record):
    """Scores of a model on the validation rows (paths.evaluate/metrics.json)."""

    loss: float  # nats per token
    perplexity: float
    kl_to_teacher: float  # nats per token
    top1_agreement: float
    accuracy: float
    calibration_error: float
    tokens: int
    parameters: int
    model_sha256: str
    kl: KlStatistics | None = None
    interval: dict[str, Interval] = Field(default_factory=dict)  # by name of a field above


class Samples(_Record):
    """Greedy continuations of prompts, by model."""

    prompts: list[str]
    continuations: dict[str, list[str]]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if any(len(texts) != len(self.prompts) for texts in self.continuations.values()):
            raise ValueError("a model has not as many continuations as there are prompts")
        return self


class GateSummary(_Record):
    """Agreement of a cache with the teacher: means over positions, except for the two extremes."""

    mean_cosine: float
    worst_row_cosine: float  # the lowest mean over a row
    mean_kl: float  # nats
    max_kl: float  # nats
    top1: float
    overlap: float
    logprob_error: float  # nats
    lse_error: float  # nats
    lse_tau_error: float  # nats
    entropy_error: float  # nats
    sampled_agreement: float


class GateLevels(_Record):
    """An error at three levels: mean, worst row, position."""

    mean: float
    worst_row: float
    position: float | None


class GateLimits(_Record):
    """The largest errors allowed, by quantity."""

    errors: dict[str, GateLevels]


class GateTest(_Record):
    """A statistic of the draws, and the range it must lie in."""

    name: str
    value: float
    low: float
    high: float


class GateFound(_Record):
    """The smallest faults that the check would have found in 95 of 100 caches."""

    errors: dict[str, GateLevels]
    wrong_positions: float  # share of positions
    wrong_shards: int
    shards: int
    shards_seen: int
    batches_for: dict[str, int]


class Gate(_Record):
    """The results of verify (paths.verify/metrics.json)."""

    passed: bool
    batches: int
    tokens: int
    cache: GateSummary
    noise_floor: GateSummary
    negative_control: GateSummary
    limits: GateLimits
    found: GateFound
    sampling_tests: dict[str, GateTest]


class GateBar(_Point):
    """A bin of the gate's histogram, given by its lower edge."""

    series: str
    log10_one_minus_cosine: float
    share: float


class CalibrationPoint(_Point):
    """A bin of the reliability diagram."""

    model: str
    confidence: float
    accuracy: float


class PassageModel(_Record):
    """The predictions of a model at each position of a passage."""

    kl: list[float]  # KL from the teacher, nats
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
    """A metric from the evaluation harness."""

    value: float | None
    stderr: float | None = None


class HumanEval(_Record):
    """Results of a model's samples for HumanEval's problems, after running them."""

    pass_at: dict[str, float]  # by k
    interval: Interval | None = None  # for pass@1
    problems: int
    samples_per_problem: int
    temperature: float
    tokens_per_second: float
    new_tokens: int  # in all samples
    statuses: dict[str, int]
    model_sha256: str


class ExportPath(_Record):
    """A program that generated text from the exported model, compared with the reference."""

    name: str
    tokens: int
    equal_tokens: int
    near_ties: int = 0  # among the different tokens
    equal_prompts: int
    required: bool
    passed: bool


class TokenizerPath(_Record):
    """A program's tokenizer compared with the teacher's on lines of text."""

    name: str
    lines: int
    equal_lines: int
    passed: bool


class ExportCheck(_Record):
    """The check of an exported model."""

    model: str
    model_sha256: str
    reference: str = "ours, float32"  # what the paths are compared with
    prompts: int
    new_tokens: int
    paths: list[ExportPath]
    tokenizer: list[TokenizerPath]
    left_out: list[str] = Field(default_factory=list)  # missing programs, with the remedy

    @property
    def passed(self) -> bool:
        """Whether every required path and every tokenizer agreed."""
        return all(path.passed for path in self.paths if path.required) and all(
            path.passed for path in self.tokenizer
        )


AllScores = Annotated[dict[str, Scores], Field(min_length=1)]
LmEval = dict[str, dict[str, dict[str, TaskMetric]]]
"""Metrics by model, task and metric."""
