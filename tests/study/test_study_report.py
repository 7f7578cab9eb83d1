"""The report, and the stage as a user runs it."""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import normalizers

from pipeline.study.comparison import Comparison, Part
from pipeline.study.study_report import describe_device, write_study
from tests.helpers import ROOT, RunPython
from tests.models import make_model, make_qwen_tokenizer
from tests.study.subjects import study_params


def made_up() -> Part:
    return Part(
        name="made_up",
        title="Made up",
        notes=["Some <b>prose</b>."],
        texts={"A text": "``` <script>\nsecond line\n"},
        tables={"A table": [("a|b", "c"), ("x|y", "<i>_z_"), (1, 2.5)]},
        comparisons=[Comparison("good", 0.0, 0.0), Comparison("bad", 2e-3, 1e-5, (2, 3))],
        files={"some.bin": b"123"},
    )


def test_markdown_and_json_say_the_same(tmp_path: Path) -> None:
    report = write_study(tmp_path, "a model", "a device", [made_up()])
    text, values = report.read_text(), json.loads((tmp_path / "study.json").read_text())
    assert "a model, on a device. 1 of 2 comparisons pass." in text
    assert (values["model"], values["passed"], values["total"]) == ("a model", 1, 2)
    assert "| bad | 2 x 3 | 2.0e-03 | 1.0e-05 | FAIL |" in text
    assert values["parts"][0]["comparisons"][1] == {
        "name": "bad",
        "measured": 2e-3,
        "limit": 1e-5,
        "shape": [2, 3],
        "passed": False,
    }
    assert (tmp_path / "some.bin").read_bytes() == b"123"


def test_markdown_cells_and_fences_hold(tmp_path: Path) -> None:
    text = write_study(tmp_path, "a model", "a device", [made_up()]).read_text()
    assert "| x\\|y | \\<i\\>\\_z\\_ |" in text
    assert "Some \\<b\\>prose" in text
    assert "````\n``` <script>\nsecond line\n````" in text  # a longer fence than any inside


def test_markdown_tables_are_whole(tmp_path: Path) -> None:
    """Every table's rows follow its rule without a blank line between them."""
    text = write_study(tmp_path, "a model", "a device", [made_up()]).read_text()
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert [len(block.splitlines()) for block in tables] == [4, 4]


@pytest.fixture
def run_stage(tmp_path: Path, run_python: RunPython) -> RunPython:
    """The stage with small parameters, by files in tmp_path."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["paths"]["study"] = str(tmp_path / "study")
    values["device"] = "cpu"
    values["study"] = study_params().model_dump(mode="json")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    return partial(run_python, "stages/study.py", "--params", str(tmp_path / "params.yaml"))


def test_stage_studies_all_parts(qwen_folder: Path, tmp_path: Path, run_stage: RunPython) -> None:
    done = run_stage("--model", str(qwen_folder), "--layer", "1")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    found = re.fullmatch(r"study: (\d+) of \1 comparisons pass; .*study\.md", last)
    assert found, last
    assert int(found[1]) == done.stdout.count("  pass  ") > 50
    folder = tmp_path / "study"
    text = (folder / "study.md").read_text()
    device = describe_device(torch.device("cpu"))
    assert device in text
    assert json.loads((folder / "study.json").read_text())["device"] == device
    assert f"  on {device}\n" in done.stdout
    assert hashlib.sha256((qwen_folder / "model.safetensors").read_bytes()).hexdigest() in text
    assert "FAIL" not in text
    assert load_file(folder / "layer_1.safetensors")["layer.input"].shape[-1] == 48
    assert {file.suffix for file in folder.iterdir()} == {".md", ".json", ".safetensors"}


def test_stage_fails_when_a_comparison_does(tmp_path: Path, run_stage: RunPython) -> None:
    folder = make_model(tmp_path / "model", "llama")
    make_qwen_tokenizer(folder, normalizer=normalizers.Lowercase())
    options = ["--model", str(folder), "--part", "tokenizer", "--output", str(tmp_path / "here")]
    done = run_stage(*options)
    assert done.returncode == 1
    assert "FAIL  round trip: English" in done.stdout
    assert "Traceback" not in done.stderr
    assert "FAIL" in (tmp_path / "here" / "study.md").read_text()
    assert not (tmp_path / "study").exists()


def test_stage_without_the_hub_says_so_in_one_sentence(
    tmp_path: Path, run_stage: RunPython
) -> None:
    done = run_stage("--model", "Qwen/no-such-model-here")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "--model=Qwen/no-such-model-here" in errors[0]
    assert "check name, revision and connection" in errors[0]
    assert not (tmp_path / "study").exists()
