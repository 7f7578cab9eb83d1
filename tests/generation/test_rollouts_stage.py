"""The stage `rollouts` as a user runs it."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from pipeline.config.params import Params
from stages.rollouts import main
from tests.generation.test_rollouts import small
from tests.models import make_teacher


def stage(tmp_path: Path, *words: str) -> Result:
    command = ["--params", str(tmp_path / "params.yaml"), *words]
    return CliRunner().invoke(main, command, catch_exceptions=False)


def test_stage(tiny_params: Params, text_folder: Path, tmp_path: Path) -> None:
    student = make_teacher(tmp_path / "student", seed=3, num_hidden_layers=2, hidden_size=32)
    sets = {**small(text_folder), "files": f"{{paths:['{text_folder}/*.jsonl'],column:text}}"}
    words = [word for key, value in sets.items() for word in ("--set", f"rollouts.{key}={value}")]
    done = stage(tmp_path, *words, "--model", str(student))
    assert done.exit_code == 0, done.output
    assert "24 rollouts of up to 12 tokens, 2 for each of 12 prompts, by" in done.output
    assert "24 ended by themselves, the others are cut at" in done.output
    assert "the first one: ..." in done.output
    done = stage(tmp_path, *words, "--model", str(student))
    assert done.exit_code == 0, done.output
    assert "has nothing to do" in done.output
    done = stage(tmp_path, *words, "--teacher")
    assert done.exit_code == 1
    assert "made with model=" in done.output
    done = stage(tmp_path, *words, "--teacher", "--overwrite")
    assert done.exit_code == 0, done.output
    done = stage(tmp_path, *words, "--teacher", "--run", "x")
    assert done.exit_code == 2
    assert "give one of them" in done.output
    done = stage(tmp_path, *words)
    assert done.exit_code == 1
    assert "run stages/train.py --run student first" in done.output
