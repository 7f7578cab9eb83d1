"""The tables that an evaluation prints: metrics with half-widths of intervals, KL, differences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from pipeline.evaluation.compare import Comparison
from pipeline.evaluation.results import TEACHER, HarnessResults
from pipeline.runtime.bootstrap import Interval

_WITH_INTERVAL = {
    "loss": "loss",
    "kl_to_teacher": "KL",
    "top1_agreement": "top-1",
    "accuracy": "accuracy",
}
_CELL = 16  # characters per number with its interval
_KL = ("mean", "median", "90 %", "95 %", "99 %", "maximum")


def comparison_lines(comparison: Comparison) -> Iterator[str]:
    """Yield all models by all metrics, the distribution of KL, and differences of the first."""
    width = max(map(len, comparison.scores))
    titles = " ".join(f"{title:>{_CELL}}" for title in _WITH_INTERVAL.values())
    yield f"  {'':{width}} {titles} {'ppl':>9} {'ECE':>7}"
    for name, scores in comparison.scores.items():
        cells = " ".join(
            f"{_number(getattr(scores, key), scores.interval.get(key)):>{_CELL}}"
            for key in _WITH_INTERVAL
        )
        yield f"  {name:{width}} {cells} {scores.perplexity:9.3f} {scores.calibration_error:7.4f}"
    yield f"  {'KL':{width}} " + " ".join(f"{title:>8}" for title in _KL)
    for name, scores in comparison.scores.items():
        if name != TEACHER:
            yield f"  {name:{width}} " + " ".join(f"{v:8.4f}" for v in asdict(scores.kl).values())
    yield from _difference_lines(comparison)
    yield f"  ±: half of a 95 % interval, by resampling {comparison.resampled}"


def _difference_lines(comparison: Comparison) -> Iterator[str]:
    first, *others = (name for name in comparison.scores if name != TEACHER)
    for name in others:
        parts = []
        for key, title in _WITH_INTERVAL.items():
            one, two = (getattr(comparison.scores[model], key) for model in (first, name))
            interval = comparison.differences[name].get(key)
            parts.append(f"{title} {_number(one - two, interval, sign='+')}")
        yield f"  {first} - {name}: {', '.join(parts)}"


def _number(value: float, interval: Interval | None, sign: str = "") -> str:
    spread = "" if interval is None else f" ± {interval.half_width:.4f}"
    return f"{value:{sign}.4f}{spread}"


def harness_lines(name: str, results: HarnessResults) -> Iterator[str]:
    """Yield one model's scores on the harness's tasks, with the harness's standard errors."""
    for task, metrics in results.items():
        for metric, found in metrics.items():
            spread = "" if found.stderr is None else f" (standard error {found.stderr:.4f})"
            yield f"  {name}: {task} {metric} {found.value:.4f}{spread}"
