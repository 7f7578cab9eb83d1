"""One command from a finished run to folder, GGUF, check and page: `make deliver RUN=NAME`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from pipeline.config.params import Params
from stages import train, verify
from tests.helpers import ROOT


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_deliver(tiny_cache: Params, tmp_path: Path, warm_python: Path) -> None:
    file = str(tmp_path / "params.yaml")
    mine = ["--set", "train.temperature=2.0", "--run", "t2"]
    for stage, words in ((verify, []), (train, mine)):
        done = CliRunner().invoke(stage.main, ["--params", file, *words])
        assert done.exit_code == 0, done.output
    there = tmp_path / "delivery"
    done = subprocess.run(
        ["make", "deliver", "RUN=t2", f"INTO={there}", f"ARGS=--params {file}", "VENV=none"],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{warm_python.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = there / "export" / "t2"
    AutoModelForCausalLM.from_pretrained(folder)
    kinds = tiny_cache.export.gguf
    assert sorted(f.name for f in folder.glob("*.gguf")) == sorted(f"t2-{k}.gguf" for k in kinds)
    assert kinds
    check = json.loads((there / "export" / "check.json").read_text())
    assert (check["model"], check["passed"]) == ("t2", True)
    metrics = json.loads((there / "evaluate" / "metrics.json").read_text())
    assert set(metrics) == {"teacher", "t2"}
    assert f"{metrics['t2']['loss']:.4f}" in (folder / "README.md").read_text()  # measured first
    page = (there / "report" / "index.html").read_text()
    assert "A t2 of" in page
    assert "This run: temperature 2." in page
    for stage in ("evaluate", "export", "report"):  # the pipeline's own are left alone
        assert not getattr(tiny_cache.paths, stage).exists()
