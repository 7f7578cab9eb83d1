"""The tutorial notebook, run as a user runs it, with the smallest settings."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from tests.helpers import ROOT, TINY

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def read_notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def cell_with(words: str) -> str:
    """The source of the one cell of code that holds `words`."""
    (cell,) = (c for c in read_notebook().cells if c.cell_type == "code" and words in c.source)
    return str(cell.source)


def parameters_for(teacher: Path, text: Path, drive: Path) -> str:
    """What stands in the cell tagged `parameters`, for the tiny teacher and text of the tests."""
    changes = {
        "device": "cpu",
        "corpus.files.paths": [str(text / "*.jsonl")],
        "study.prompt": "the cat",
        "study.max_new_tokens": 3,
        **{f"{part}.{key}": value for part, keys in TINY.items() for key, value in keys.items()},
    }
    lines = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    given = {"RECIPE": "demo", "SIZE": "small", "TEACHER": str(teacher), "CHANGES": lines}
    given |= {"WORK": "unused", "DRIVE": str(drive), "REPOSITORY": ""}
    return "\n".join(f"{name} = {value!r}" for name, value in given.items())


def test_it_runs_from_top_to_bottom(
    teacher_folder: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Colab, or what the notebook sees of it: its Google Drive is a folder here."""
    colab = tmp_path / "colab" / "google" / "colab"
    colab.mkdir(parents=True)
    (colab / "__init__.py").write_text("")
    (colab / "drive.py").write_text("def mount(where):\n    print('mounted', where)\n")
    paths = os.pathsep.join([str(ROOT), str(tmp_path / "colab")])
    monkeypatch.setenv("PYTHONPATH", paths, prepend=os.pathsep)  # the kernel's
    notebook = read_notebook()
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    cell.source = parameters_for(teacher_folder, text_folder, tmp_path / "drive")
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}  # as Jupyter starts it
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    said = "".join(
        output.get("text", "") for c in notebook.cells for output in c.get("outputs", ())
    )
    for words in (
        "mounted /content/drive",
        "advise: ",
        "prepare: about ",
        "train: about ",
        "student/model is trained",
        "--- top-p\nthe cat",
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
    assert kinds.count("image/png") >= 2  # attention weights and curves
    kept = tmp_path / "drive" / "demo"
    assert (kept / "student.zip").stat().st_size > 10_000
    assert {"corpus.zarr", "logits.zarr", "runs"} <= {file.name for file in kept.iterdir()}


def test_alone_it_clones_and_installs_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the address that the reader sets; the package of that name is somebody else's."""
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        ran.append(command)
        if command[0] == "git":
            (tmp_path / "decant" / "stages").mkdir(parents=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "before")
    values = {"DRIVE": "", "WORK": "work", "RECIPE": "demo", "REPOSITORY": ""}
    setup = cell_with('"clone"')
    with pytest.raises(SystemExit, match="set REPOSITORY above"):
        exec(setup, dict(values))
    assert not ran
    address = "https://example.org/someone/project.git"
    exec(setup, values | {"REPOSITORY": address})
    assert ran == [
        ["git", "clone", "--depth", "1", address, "decant"],
        [sys.executable, "-m", "pip", "install", "--quiet", "-e", ".[demo]"],
    ]
    assert Path.cwd() == tmp_path / "decant"
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "decant"), "before"]


@pytest.mark.parametrize("size", ["small", "full"])
def test_a_recipe_is_taken_by_name_on_a_t4(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its plan is that of a T4, and the teacher is in float16, whatever the recipe says."""
    monkeypatch.chdir(ROOT)
    values: dict[str, Any] = {"Path": Path}
    exec(cell_with("REPOSITORY = "), values)
    values |= {"RECIPE": "coder-7b-smoke", "SIZE": size, "work": tmp_path, "DRIVE": str(tmp_path)}
    exec(cell_with("def number_formats"), values)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla T4")
    about = SimpleNamespace(total_memory=15.8e9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: about)
    values |= {"device": torch.device("cuda"), "has_bfloat16_units": lambda _: False}
    start = tmp_path / "Qwen2.5-Coder-0.5B-Instruct"  # known by its name
    values["CHANGES"] = [f"student.checkpoint={start}"]
    exec(cell_with("load_params("), values)
    params = values["params"]
    assert params.prepare.k == 64
    assert (params.prepare.dtype, params.evaluate.dtype) == ("float16", "float16")
    assert params.train.dtype == "float16"
    assert params.advise.device == "t4"
    assert params.paths.teacher == tmp_path / "teacher"
    assert params.train.steps == (32 if size == "small" else 500)
    exec(cell_with("plan_lines("), values)
    values["expect"]("train")
    said = capsys.readouterr().out
    assert "on 1 x t4, the cache" in said
    assert "train: about " in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "planned"),
    [("Tesla T4", "t4"), ("NVIDIA L4", "l4"), ("NVIDIA L40S", ""), ("NVIDIA H100 80GB", "h100")],
)
def test_gpus_are_known_by_their_names(
    name: str, planned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {}
    exec(cell_with("def planned_device"), values)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    about = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: about)
    assert values["planned_device"](torch.device("cuda")) == planned


def test_an_unknown_recipe_is_refused_with_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=r"RECIPE='wiki' is none of demo, .*wikipedia-zh-t4"):
        exec(cell_with("load_params("), {"RECIPE": "wiki", "Path": Path, "work": tmp_path})


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
