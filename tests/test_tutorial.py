"""The tutorial notebook, run as a user runs it, with the smallest settings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT, TINY

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def read_notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def parameters_for(teacher: Path, text: Path, work: Path) -> str:
    """What stands in the cell tagged `parameters`, for the tiny teacher and text of the tests."""
    changes = {
        "device": "cpu",
        "corpus.files.paths": [str(text / "*.jsonl")],
        "study.prompt": "the cat",
        "study.new_tokens": 3,
        **{f"{part}.{key}": value for part, keys in TINY.items() for key, value in keys.items()},
    }
    lines = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    given = {"SIZE": "small", "WORK": str(work), "TEACHER": str(teacher), "CHANGES": lines}
    given |= {"DRIVE": False, "REPOSITORY": ""}
    return "\n".join(f"{name} = {value!r}" for name, value in given.items())


def test_it_runs_from_top_to_bottom(
    teacher_folder: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # the kernel's
    notebook = read_notebook()
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    cell.source = parameters_for(teacher_folder, text_folder, tmp_path / "work")
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}  # as Jupyter starts it
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    said = "".join(
        output.get("text", "") for c in notebook.cells for output in c.get("outputs", ())
    )
    for words in (
        "teacher: llama, 4 layers",
        "default shape: 123.4 M parameters",
        "comparisons pass",
        "negative control",
        "gate passed",
        "validation loss",
        "--- greedy",
        "--- top-k",
        "--- top-p",
        "LlamaForCausalLM: logits differ from ours by at most",
    ):
        assert words in said, words
    kinds = [
        kind for c in notebook.cells for o in c.get("outputs", ()) for kind in o.get("data", {})
    ]
    assert kinds.count("image/svg+xml") == 2
    assert "image/png" in kinds  # the curves
    assert (tmp_path / "work" / "student.zip").stat().st_size > 10_000


def test_it_is_kept_without_outputs() -> None:
    notebook = read_notebook()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_its_parameters_are_those_that_the_test_replaces() -> None:
    (cell,) = (c for c in read_notebook().cells if "parameters" in c.metadata.get("tags", ()))
    defaults: dict[str, Any] = {}
    exec(cell.source, defaults)
    replaced: dict[str, Any] = {}
    exec(parameters_for(Path("a"), Path("b"), Path("c")), replaced)
    assert defaults.keys() == replaced.keys()
