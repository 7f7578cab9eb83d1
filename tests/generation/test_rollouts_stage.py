"""The stage `rollouts` as a user runs it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import ROLLOUTS, CorpusSplit, read_made_from
from pipeline.errors import DecantError
from stages import corpus
from stages.rollouts import main
from tests.generation.test_rollouts import small
from tests.models import make_teacher


def stage(tmp_path: Path, *words: str) -> Result:
    command = ["--params", str(tmp_path / "params.yaml"), *words]
    return CliRunner().invoke(main, command, catch_exceptions=False)


def words_of(text_folder: Path) -> list[str]:
    sets = {**small(text_folder), "files": f"{{paths:['{text_folder}/*.jsonl'],column:text}}"}
    return [word for key, value in sets.items() for word in ("--set", f"rollouts.{key}={value}")]


def test_stage(tiny_params: Params, text_folder: Path, tmp_path: Path) -> None:
    student = make_teacher(tmp_path / "student", seed=3, num_hidden_layers=2, hidden_size=32)
    words = words_of(text_folder)
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


def test_other_files_are_refused_by_the_parameter_that_names_them(
    tiny_params: Params, text_folder: Path, tmp_path: Path
) -> None:
    mine = tiny_params.paths.rollouts / "corpus.zarr" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    done = stage(tmp_path, *words_of(text_folder), "--teacher")
    assert done.exit_code == 1
    assert "set paths.rollouts to another place" in done.output
    assert mine.read_text() == "mine"


def test_no_text_replaces_rollouts_unasked(
    tiny_params: Params, text_folder: Path, tmp_path: Path
) -> None:
    address = tiny_params.paths.rollouts / "corpus.zarr"
    words = [*words_of(text_folder), "--set", f"paths.corpus={address}"]
    assert stage(tmp_path, *words, "--teacher").exit_code == 0
    before = CorpusSplit(address, "train").info
    command = ["--params", str(tmp_path / "params.yaml"), *words]
    for more in ([], ["--append"]):
        done = CliRunner().invoke(corpus.main, [*command, *more])
        assert done.exit_code == 1
        assert f"{address} holds rollouts, which stages/rollouts.py made" in done.output
        assert "run stages/rollouts.py to write rollouts again" in done.output
    assert CorpusSplit(address, "train").info == before

    shard = address / "train" / "tokens" / "c" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(DecantError, match=rf"damaged .*: remove {address}, then run stages/roll"):
        CorpusSplit(address, "train").rows(0, 1)
    shutil.rmtree(address)
    done = stage(tmp_path, *words, "--teacher")
    assert "; 0 of " in done.output  # tokens sampled now
    assert CorpusSplit(address, "train").info == before

    assert CliRunner().invoke(corpus.main, [*command, "--overwrite"]).exit_code == 0
    assert ROLLOUTS not in read_made_from(address)
