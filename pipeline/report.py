"""One self-contained HTML page about a pipeline's run: numbers, pictures, samples, provenance.

Reads only what the other stages wrote. Pictures are SVG (pipeline/figures.py), embedded; text in
them takes the page's colour, so they work on light and dark. The page's template is report.html
beside this file. `markdown_table` makes the README's table from the same numbers. A sweep is shown
only where asked for, since no stage of dvc.yaml declares the runs that it compares.
"""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline.config import Params
from pipeline.data.rows import SPLITS, CorpusSplit
from pipeline.errors import DecantError
from pipeline.figures import INK, draw_svg
from pipeline.files import write_text
from pipeline.store.reader import CacheReader
from pipeline.sweep import SweepRun, sweep_figures, sweep_rows

_COLOURS = {
    "teacher": "#8a8f98",
    "student": "#2f7de1",
    "baseline": "#e07b39",
    "cache": "#2f7de1",
    "noise floor": "#8a8f98",
    "shifted by one": "#c8453b",
}
_COLUMNS = {
    "loss": "validation loss",
    "perplexity": "perplexity",
    "kl_to_teacher": "KL to teacher",
    "top1_agreement": "top-1 agreement",
    "accuracy": "accuracy",
    "calibration_error": "calibration error",
    "parameters": "parameters",
}
_PACKAGES = ("torch", "transformers", "zarr", "numpy", "dvc")


def write_report(params: Params, sweep: Sequence[SweepRun] = ()) -> Path:
    """Write `paths.report`/index.html and return its path.

    Args:
        sweep: runs to be compared in a section of their own; none: no such section.

    Raises:
        DecantError: a stage that the page shows has not run, which is named.
    """
    try:
        from jinja2 import Environment
    except ImportError:
        raise DecantError(
            "the report needs jinja2 and matplotlib: install them by `pip install decant[report]`"
        ) from None
    paths = params.paths
    scores: dict[str, dict[str, float]] = _read(paths.evaluate / "metrics.json", "evaluate")
    samples = _read(paths.evaluate / "samples.json", "evaluate")
    gate = _read(paths.verify / "metrics.json", "verify")
    curves = {
        run: read_curves(paths.runs / run / "dvclive" / "plots" / "metrics")
        for run in scores
        if run != "teacher"
    }
    corpora = {split: CorpusSplit(paths.corpus, split) for split in SPLITS}
    cache = CacheReader(paths.logits, corpora["train"])
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("pipeline").joinpath("report.html").read_text()
    )
    page = template.render(
        columns=_COLUMNS,
        scores={name: _formatted(values) for name, values in scores.items()},
        gate=gate,
        corpora={split: corpus.info for split, corpus in corpora.items()},
        cache_bytes=cache.num_bytes() / (cache.fingerprint.num_rows * cache.fingerprint.row_length),
        fingerprint=vars(cache.fingerprint),
        figures={
            "loss": _curves(curves, "validation/loss", "validation loss, nats"),
            "kl": _curves(curves, "validation/kl", "KL to cached teacher, nats"),
            "train": _curves(curves, "train/loss", "training loss, nats"),
            "gate": _gate(_read(paths.verify / "histogram.json", "verify")),
            "calibration": _calibration(_read(paths.evaluate / "calibration.json", "evaluate")),
        },
        sweep=sweep_rows(sweep),
        sweep_figures=sweep_figures(sweep),
        samples=samples,
        train=params.train.model_dump(mode="json"),
        student=params.student.model_dump(mode="json"),
        versions={name: version(name) for name in _PACKAGES},
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    )
    target = paths.report / "index.html"
    write_text(target, page)
    return target


def markdown_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The comparison of models as a Markdown table, for the README."""
    lines = [
        "| | " + " | ".join(_COLUMNS.values()) + " |",
        "|---|" + "---:|" * len(_COLUMNS),
    ]
    for name, values in scores.items():
        cells = _formatted(values)
        lines.append(f"| {name} | " + " | ".join(cells[column] for column in _COLUMNS) + " |")
    return "\n".join(lines)


def read_curves(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """DVCLive's TSV files below a folder -> {metric: (steps, values)}."""
    curves = {}
    for file in sorted(folder.rglob("*.tsv")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        with file.open() as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        values = [float(row[file.stem]) for row in rows]
        curves[name] = ([float(row["step"]) for row in rows], values)
    if not curves:
        raise DecantError(f"{folder} holds no curves: run stages/train.py first")
    return curves


def _formatted(values: Mapping[str, float]) -> dict[str, str]:
    """Numbers as they stand in tables."""
    return {
        "loss": f"{values['loss']:.3f}",
        "perplexity": f"{values['perplexity']:.2f}",
        "kl_to_teacher": f"{values['kl_to_teacher']:.3f}",
        "top1_agreement": f"{values['top1_agreement']:.1%}",
        "accuracy": f"{values['accuracy']:.1%}",
        "calibration_error": f"{values['calibration_error']:.3f}",
        "parameters": f"{values['parameters'] / 1e6:.1f} M",
    }


def _read(file: Path, stage: str) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        raise DecantError(f"{file} cannot be read: run stages/{stage}.py first") from None


def _curves(
    runs: Mapping[str, Mapping[str, tuple[list[float], list[float]]]], metric: str, label: str
) -> str:
    def draw(axes: Any) -> None:
        for run, curves in runs.items():
            if metric in curves:
                axes.plot(*curves[metric], label=run, color=_COLOURS.get(run), linewidth=1.6)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)

    return draw_svg([draw])


def _gate(histogram: list[dict[str, Any]]) -> str:
    def draw(axes: Any) -> None:
        for name in dict.fromkeys(row["series"] for row in histogram):
            rows = [row for row in histogram if row["series"] == name]
            places = [row["log10_one_minus_cosine"] for row in rows]
            shares = [row["share"] for row in rows]
            options = {"align": "edge", "width": 0.5, "alpha": 0.6, "label": name}
            axes.bar(places, shares, color=_COLOURS.get(name), **options)
        axes.set_xlabel("log10(1 - cosine) of a position")
        axes.set_ylabel("share of positions")

    return draw_svg([draw])


def _calibration(points: list[dict[str, Any]]) -> str:
    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        for name in dict.fromkeys(point["model"] for point in points):
            mine = [point for point in points if point["model"] == name]
            confidence = [point["confidence"] for point in mine]
            accuracy = [point["accuracy"] for point in mine]
            axes.plot(confidence, accuracy, "o-", ms=3, label=name, color=_COLOURS.get(name))
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")

    return draw_svg([draw])
