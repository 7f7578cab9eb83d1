"""The page's pictures; each series has a colour and, for colour-blind users, a dash or a marker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.results import CalibrationBin
from pipeline.report.read_inputs import Curve
from pipeline.report.retained import RetainedMass
from pipeline.runtime.figures import INK, SERIES, draw_svg
from pipeline.verify.gate_report import HistogramBin

_INCHES = (4.6, 3.0)
_STYLES: dict[str, dict[str, Any]] = {
    "student": {"color": SERIES[0], "linestyle": "-"},
    "baseline": {"color": SERIES[1], "linestyle": (0, (5, 2))},
    "teacher": {"color": SERIES[2], "linestyle": (0, (1, 1.2))},
    "cache": {"color": SERIES[0], "linestyle": "-"},
    "noise floor": {"color": SERIES[2], "linestyle": (0, (1, 1.2))},
    "shifted by one": {"color": SERIES[1], "linestyle": (0, (5, 2))},
}
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_MARKERS = {"student": "o", "baseline": "s", "teacher": "^"}


def draw_curves(runs: Mapping[str, Mapping[str, Curve]], metric: str, label: str) -> str:
    """Draw a metric over the steps, one line per run; return empty text if no run has it."""
    shown = {run: curves[metric] for run, curves in runs.items() if metric in curves}
    if not shown:
        return ""

    def draw(axes: Any) -> None:
        for number, (run, curve) in enumerate(shown.items()):
            axes.plot(*curve, label=run, linewidth=1.6, **_style(run, number))
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)

    ends = [f"{run} from {y[0]:.3f} to {y[-1]:.3f}" for run, (_, y) in shown.items() if y]
    return draw_svg([draw], inches=_INCHES, alt=f"{label}, by step: {'; '.join(ends)}")


def draw_gate(bars: Sequence[HistogramBin]) -> str:
    """Draw the gate's histogram: the distance of each cached position from the live teacher."""
    names = list(dict.fromkeys(bar.series for bar in bars))

    def draw(axes: Any) -> None:
        for number, name in enumerate(names):
            mine = sorted((b.log10_one_minus_cosine, b.share) for b in bars if b.series == name)
            lows, shares = zip(*mine, strict=True)
            edges = [*lows, lows[-1] + (lows[1] - lows[0] if len(lows) > 1 else 1.0)]
            style = _style(name, number)
            axes.stairs(shares, edges, label=name, linewidth=1.6, **style)
            axes.stairs(shares, edges, fill=True, color=style["color"], alpha=0.14)
        axes.set_xlabel("log10(1 - cosine) of a position: left alike, right unrelated")
        axes.set_ylabel("share of positions")

    peaks = {n: max((b for b in bars if b.series == n), key=lambda b: b.share) for n in names}
    words = [f"{name} most at {bar.log10_one_minus_cosine:g}" for name, bar in peaks.items()]
    alt = f"Histogram of log10(1 - cosine): {'; '.join(words)}"
    return draw_svg([draw], inches=_INCHES, alt=alt)


def draw_retained_mass(mass: RetainedMass) -> str:
    """Draw retained mass over positions, from least to most, with one line per temperature."""

    def draw(axes: Any) -> None:
        for number, at in enumerate(mass.temperatures):
            style = {"color": SERIES[number % len(SERIES)], "linestyle": _DASHES[number % 4]}
            label = f"temperature {at.temperature:g}"
            axes.plot(100.0 * mass.shares, at.quantiles, label=label, linewidth=1.6, **style)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("positions, those that keep least first, %")
        axes.set_ylabel("probability the stored ids hold")

    words = [f"{at.mean:.1%} at temperature {at.temperature:g}" for at in mass.temperatures]
    return draw_svg([draw], inches=_INCHES, alt=f"Retained mass, on average {', '.join(words)}")


def draw_calibration(points: Sequence[CalibrationBin]) -> str:
    """Draw the reliability diagram."""
    names = list(dict.fromkeys(point.model for point in points))

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        for number, name in enumerate(names):
            mine = [point for point in points if point.model == name]
            axes.plot(
                [point.confidence for point in mine],
                [point.accuracy for point in mine],
                label=name,
                marker=_MARKERS.get(name, "d"),
                ms=3.5,
                linewidth=1.4,
                **_style(name, number),
            )
        axes.set_xlabel("confidence of the most probable id")
        axes.set_ylabel("share of them that are right")

    alt = f"Accuracy against confidence of {', '.join(names)}; the calibrated lie on the diagonal"
    return draw_svg([draw], inches=_INCHES, alt=alt)


def _style(name: str, number: int) -> dict[str, Any]:
    """Return a name's usual style, or one that no usual name has."""
    further = {"color": SERIES[3 + number % 3], "linestyle": _DASHES[3 - number % 3]}
    return _STYLES.get(name, further)
