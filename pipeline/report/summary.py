"""The run at a glance: key numbers, and the comparison of models as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.evaluation.results import TEACHER, ModelScores
from pipeline.runtime.bootstrap import Interval
from pipeline.runtime.markdown import markdown_table

BASELINE = "baseline"


@dataclass(frozen=True)
class Column:
    """Title and format of a metric in tables."""

    title: str
    shown: Callable[[float], str]


def readable_count(count: float) -> str:
    """Format a count by powers of ten: 84953664 -> "85.0 M"."""
    return f"{count / 1e9:.2f} B" if count >= 999.95e6 else f"{count / 1e6:.1f} M"


COLUMNS = {
    "loss": Column("validation loss", "{:.3f}".format),
    "perplexity": Column("perplexity", "{:.2f}".format),
    "kl_to_teacher": Column("KL to teacher", "{:.3f}".format),
    "top1_agreement": Column("top-1 agreement", "{:.1%}".format),
    "accuracy": Column("accuracy", "{:.1%}".format),
    "calibration_error": Column("calibration error", "{:.3f}".format),
    "parameters": Column("parameters", readable_count),
}


@dataclass(frozen=True)
class Place:
    """A model's loss on a scale from the lowest loss to the highest, in percent of its length."""

    name: str
    value: float
    at: float
    low: float
    high: float


def scores_markdown(scores: Mapping[str, ModelScores]) -> str:
    """Return the comparison of models as a Markdown table, for the README."""
    rows = [
        [name, *(cell + margin for cell, margin in table_cells(values).values())]
        for name, values in scores.items()
    ]
    head = ["", *(column.title for column in COLUMNS.values())]
    return markdown_table(head, rows, numbers=True)


def table_cells(scores: ModelScores) -> dict[str, tuple[str, str]]:
    """Return each metric of a model with its margin, half the interval: ("3.097", " ± 0.021")."""
    cells = {}
    for name, column in COLUMNS.items():
        interval = scores.interval.get(name)
        half = interval.half_width if interval else 0.0
        margin = f" ± {column.shown(half)}" if half else ""  # 0 where the teacher meets itself
        cells[name] = column.shown(getattr(scores, name)), margin
    return cells


def student_of(scores: Mapping[str, ModelScores]) -> str | None:
    """Return the model that the page is about: "student", else the first distilled one."""
    others = [name for name in scores if name not in (TEACHER, BASELINE)]
    return "student" if "student" in others else next(iter(others), None)


def gap_closed(scores: Mapping[str, ModelScores]) -> float | None:
    """Return (baseline - student) / (baseline - teacher) in validation loss, None if undefined.

    1 means that the student is as good as its teacher, 0 that distilling gained nothing, a negative
    value that it did harm.
    """
    student = student_of(scores)
    if student is None or TEACHER not in scores or BASELINE not in scores:
        return None
    gap = scores[BASELINE].loss - scores[TEACHER].loss
    gained = scores[BASELINE].loss - scores[student].loss
    return gained / gap if gap > 0.0 and math.isfinite(gained / gap) else None


def places(scores: Mapping[str, ModelScores]) -> list[Place]:
    """Return the models with a finite loss, placed on one scale."""
    spans = {
        name: values.interval.get("loss", Interval(low=values.loss, high=values.loss))
        for name, values in scores.items()
        if math.isfinite(values.loss)
    }
    least = min((span.low for span in spans.values()), default=0.0)
    length = max((span.high for span in spans.values()), default=0.0) - least or 1.0

    def share(value: float) -> float:
        return 100.0 * (value - least) / length

    return [
        Place(name, scores[name].loss, share(scores[name].loss), share(span.low), share(span.high))
        for name, span in spans.items()
    ]
