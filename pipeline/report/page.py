"""Render the page: inputs and pictures into templates/page.html.

The page contains everything it shows and loads nothing, which its content security policy also
forbids. The only script allowed is its own, by hash, and the page works without it. The templates
escape text from models and corpora.
"""

from __future__ import annotations

import base64
import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline.config.names import corpus_name, start_name, teacher_name
from pipeline.config.params import Params
from pipeline.config.params_text import yaml_value
from pipeline.config.train_params import StudentParams
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit, other_text
from pipeline.evaluation.results import TEACHER
from pipeline.io.files import write_text
from pipeline.logit_cache.reader import CacheReader
from pipeline.report.passage_view import KL_STEPS, passage_view
from pipeline.report.pictures import (
    draw_calibration,
    draw_curves,
    draw_gate,
    draw_retained_mass,
)
from pipeline.report.read_inputs import Inputs, differences, params_of_run, read_inputs
from pipeline.report.retained import measure_retained_mass
from pipeline.report.summary import (
    BASELINE,
    COLUMNS,
    gap_closed,
    places,
    readable_count,
    student_of,
    table_cells,
)
from pipeline.report.sweep import SweepRun, sweep_figures, sweep_rows, sweep_scatter
from pipeline.runtime.console import announce
from pipeline.runtime.optional import require

_PACKAGES = ("torch", "transformers", "zarr", "numpy", "dvc")
_SECTIONS = {  # in the page's order; each has a template with its name
    "models": ("Models", "Models on the validation text"),
    "gate": ("Gate", "The gate: cache against live teacher"),
    "retained": ("Cache", "What the cache keeps"),
    "training": ("Training", "Training and calibration"),
    "passage": ("Passage", "A passage, token by token"),
    "samples": ("Samples", "Samples"),
    "humaneval": ("HumanEval", "HumanEval"),
    "harness": ("Harness", "Evaluation harness"),
    "export": ("Export", "Export"),
    "sweep": ("Sweep", "Sweep"),
    "provenance": ("Provenance", "Provenance"),
}


def write_report(params: Params, sweep: Sequence[SweepRun] = ()) -> Path:
    """Write `paths.report`/index.html and return its path.

    Args:
        sweep: runs to compare in a section of their own; without any, there is no such section.

    Raises:
        DecantError: a required stage has not run (the message names it), or one of its files
            cannot be read.
    """
    announce(
        "report", f"writes {params.paths.report / 'index.html'} from what the other stages left"
    )
    require("jinja2", "report", "the report")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    inputs = read_inputs(params.paths)
    student = student_of(inputs.scores)
    params = params_of_run(params, student)
    values = {
        **_provenance(params),
        **_of_models(inputs),
        **_of_tasks(inputs),
        **_of_sweep(sweep),
        "inputs": inputs,
        "how": params.train.targets if student is None or student in inputs.curves else "elsewhere",
        "unlike": differences(params.paths, student, BASELINE),
        "script": _script(),
    }
    environment = Environment(
        loader=PackageLoader("pipeline.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": "{:.1%}".format,
        "count": "{:,}".format,
        "readable": readable_count,
    }
    shown = {
        "passage": values["passage"],
        "retained": values["retained"],
        "sweep": values["sweep"],
        "humaneval": inputs.humaneval,
        "harness": inputs.lm_eval,
        "export": inputs.export,
    }
    sections = {name: titles for name, titles in _SECTIONS.items() if shown.get(name, True)}
    page = environment.get_template("page.html").render(values, sections=sections)
    target = params.paths.report / "index.html"
    write_text(target, page)
    return target


def _provenance(params: Params) -> dict[str, Any]:
    """Collect what was distilled from what, and on which machine."""
    corpora = {split: CorpusSplit(params.paths.corpus, split) for split in SPLITS}
    cache = CacheReader(params.paths.logits, corpora["train"])
    fingerprint, size = cache.fingerprint, cache.num_bytes()
    mass = measure_retained_mass(cache)
    facts = asdict(fingerprint).items()
    origin, name = fingerprint.imported_from, teacher_name(params.teacher)
    return {
        "teacher": "an unrecorded teacher" if origin else name.removesuffix(".gguf"),
        "text": other_text(params.paths.corpus, origin) or corpus_name(params.corpus),
        "start": start_name(params.student.model_dump()),
        "params": params,
        "trained_by": _as_written(params.train.model_dump(mode="json")),
        "student_of": _as_written(_student_facts(params.student)),
        "corpora": {split: corpus.info for split, corpus in corpora.items()},
        "cache_bytes": size,
        "bytes_a_token": size / (fingerprint.num_rows * fingerprint.row_length),
        "fingerprint": fingerprint,
        "captured_by": {key: value for key, value in facts if value is not None},
        "retained": mass,
        "retained_figure": draw_retained_mass(mass) if mass else "",
        "versions": {name: version(name) for name in _PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def _student_facts(params: StudentParams) -> dict[str, Any]:
    """Return the keys that the student was made by; without a random start its shape is given."""
    keys = {"init", "lora", "dropout"}
    if params.init == "random":
        keys = type(params).model_fields.keys() - {"checkpoint", "layers", "lora"}
    else:
        keys.add(params.init)
    return params.model_dump(mode="json", include=keys)


def _as_written(values: dict[str, Any]) -> dict[str, str]:
    """Return values as params.yaml has them."""
    return {name: yaml_value(value) for name, value in values.items()}


def _of_models(inputs: Inputs) -> dict[str, Any]:
    """Collect the numbers and pictures of teacher and students."""
    scores, curves = inputs.scores, inputs.curves
    student = student_of(scores)
    pictures = {
        "Cross-entropy on validation rows.": draw_curves(
            curves, "validation/loss", "validation loss, nats"
        ),
        "KL to the cached teacher on validation rows, at temperature 1, all other ids as one.": (
            draw_curves(curves, "validation/kl", "KL to cached teacher, nats")
        ),
        "The objective on training batches. Runs that differ in it minimise different functions.": (
            draw_curves(curves, "train/loss", "training loss, nats")
        ),
    }
    return {
        "student": student,
        "teacher_scores": scores.get(TEACHER),
        "columns": COLUMNS,
        "cells": {name: table_cells(values) for name, values in scores.items()},
        "gap": gap_closed(scores),
        "places": places(scores),
        "gate_figure": draw_gate(inputs.histogram),
        "calibration_figure": draw_calibration(inputs.calibration),
        "curves": {caption: picture for caption, picture in pictures.items() if picture},
        "passage": passage_view(inputs.passage, student) if inputs.passage else None,
        "kl_steps": KL_STEPS,
    }


def _of_tasks(inputs: Inputs) -> dict[str, Any]:
    """Collect HumanEval's columns and the harness's rows; models need not share them."""
    passes = (k for values in (inputs.humaneval or {}).values() for k in values.pass_at)
    rows = (
        (task, metric)
        for tasks in (inputs.lm_eval or {}).values()
        for task, metrics in tasks.items()
        for metric in metrics
    )
    return {
        "humaneval_ks": {k: f"pass@{k}" for k in passes},
        "harness_rows": list(dict.fromkeys(rows)),
    }


def _of_sweep(runs: Sequence[SweepRun]) -> dict[str, Any]:
    return {
        "sweep": sweep_rows(runs),
        "sweep_figures": sweep_figures(runs),
        "sweep_scatter": sweep_scatter(runs),
    }


def _script() -> dict[str, str]:
    """Return the page's script and its hash for the content security policy."""
    text = files("pipeline.report").joinpath("templates/script.js").read_text("utf-8")
    digest = hashlib.sha256(text.encode()).digest()
    return {"text": text, "sha256": base64.b64encode(digest).decode()}
