"""The page, the Markdown, and the stage as a user runs it."""

from __future__ import annotations

import hashlib
import html
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import normalizers

from pipeline.errors import DecantError
from pipeline.runtime.optional import install_hint
from pipeline.study.machine import describe_device
from pipeline.study.report import write_study
from pipeline.study.section import Comparison, Picture, Section, Table
from tests.conftest import ROOT, RunPython
from tests.study.conftest import make_model, make_qwen_tokenizer, study_params


def made_up() -> Section:
    return Section(
        "made_up",
        "Made up",
        prose=["Some <b>prose</b>."],
        texts=[("A text", "``` <script>\nsecond line\n")],
        tables=[Table("A table", ("a|b", "c"), [("x|y", "<i>_z_"), (1, 2.5)], folded=True)],
        pictures=[Picture("line", "A line.", [lambda axes: axes.plot([1, 2])])],
        comparisons=[Comparison("good", 0.0, 0.0), Comparison("bad", 2e-3, 1e-5)],
        files={"some.bin": b"123"},
    )


def test_page_and_markdown_say_the_same(tmp_path: Path) -> None:
    page = write_study(tmp_path, "a model", "a device", [made_up()]).read_text()
    text = (tmp_path / "report.md").read_text()
    for report in (page, text):
        assert "1 of 2 comparisons pass" in report
        assert "a model, on a device." in report
    assert "| bad | 2.0e-03 | 1.0e-05 | **FAIL** |" in text
    assert '<tr class="failed"><td>bad</td><td>2.0e-03</td><td>1.0e-05</td><td>FAIL</td>' in page
    assert '<tr class="passed"><td>good</td><td>0</td>' in page
    assert (tmp_path / "some.bin").read_bytes() == b"123"


def test_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = write_study(tmp_path, "a model", "a device", [made_up()]).read_text()
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert "<script" not in page
    assert "<b>" not in page
    assert page.count("<svg") == 1
    assert "currentColor" in page


def test_markdown_cells_and_fences_hold(tmp_path: Path) -> None:
    write_study(tmp_path, "a model", "a device", [made_up()])
    text = (tmp_path / "report.md").read_text()
    assert "| x\\|y | \\<i\\>\\_z\\_ |" in text
    assert "````\n``` <script>\nsecond line\n````" in text  # a longer fence than any inside
    assert "![A line.](line.svg)" in text
    assert (tmp_path / "line.svg").read_text().startswith("<svg")


def test_markdown_tables_are_whole(tmp_path: Path) -> None:
    """Every table's rows follow its rule without a blank line between them."""
    write_study(tmp_path, "a model", "a device", [made_up()])
    blocks = (tmp_path / "report.md").read_text().split("\n\n")
    tables = [block for block in blocks if block.lstrip().startswith("|")]
    assert [len(block.strip().splitlines()) for block in tables] == [4, 4]


def test_without_jinja_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DecantError, match=re.escape(install_hint("report"))):
        write_study(tmp_path, "a model", "a device", [made_up()])
    assert not list(tmp_path.iterdir())


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
    found = re.fullmatch(r"study: (\d+) of \1 comparisons pass; .*index\.html", last)
    assert found, last
    assert int(found[1]) == done.stdout.count("  pass  ") > 50
    folder = tmp_path / "study"
    page = (folder / "index.html").read_text()
    device = describe_device(torch.device("cpu"))
    assert device in html.unescape(page)
    assert f"  on {device}\n" in done.stdout
    assert hashlib.sha256((qwen_folder / "model.safetensors").read_bytes()).hexdigest() in page
    assert page.count("<svg") == 6
    assert "FAIL" not in page
    assert load_file(folder / "layer_1.safetensors")["layer.input"].shape[-1] == 48
    assert {file.suffix for file in folder.iterdir()} == {".html", ".md", ".svg", ".safetensors"}


def test_stage_fails_when_a_comparison_does(tmp_path: Path, run_stage: RunPython) -> None:
    folder = make_model(tmp_path / "model", "llama")
    make_qwen_tokenizer(folder, normalizer=normalizers.Lowercase())
    options = ["--model", str(folder), "--part", "tokenizer", "--output", str(tmp_path / "here")]
    done = run_stage(*options)
    assert done.returncode == 1
    assert "FAIL  round trip: English" in done.stdout
    assert "Traceback" not in done.stderr
    assert "FAIL" in (tmp_path / "here" / "index.html").read_text()
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
