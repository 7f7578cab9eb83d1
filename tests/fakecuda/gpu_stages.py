"""The stages on a GPU or the stand-in for one, with the formats that `auto` chooses there."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from pipeline.config.params import Params
from pipeline.training.run import run_training
from tests.fakecuda import stand_in
from tests.helpers import change, losses, tiny_values

HAS_BFLOAT16 = torch.cuda.get_device_capability()[0] >= 8


SHORT = {"steps": 3, "batch_rows": 2, "eval_every": 3, "eval_rows": 2}


def on_device(params: Params, device: str) -> Params:
    return Params.model_validate(params.model_dump(mode="json") | {"device": device})


@pytest.mark.parametrize("targets", ["cached", "online", "none"])
def test_a_run_has_the_losses_of_one_on_a_cpu(targets: str, tiny_cache: Params) -> None:
    params = change(tiny_cache, train=SHORT | {"targets": targets})
    runs = {}
    for device in ("cpu", "cuda"):
        runs[device] = run_training(on_device(params, device), device).folder
    expected, found = losses(runs["cpu"]), losses(runs["cuda"])
    assert found.keys() == expected.keys()
    for name, (steps, values) in found.items():
        assert steps == expected[name][0]
        assert values == pytest.approx(expected[name][1], rel=2e-3, abs=2e-4), name


class Project:
    """A folder with params.yaml, in which stages are run as by hand."""

    def __init__(self, teacher: Path, text: Path, folder: Path) -> None:
        values = tiny_values(teacher, text, folder / "cache")
        values["device"] = "auto"
        values["paths"]["teacher"] = str(teacher)
        for section in ("prepare", "train", "evaluate", "study"):
            values[section]["dtype"] = "auto"
        values["train"] |= SHORT
        # Interpreted kernels take 0.1 s per row.
        values["corpus"] |= {"train_tokens": 800, "validation_tokens": 200}
        values["verify"] |= {"batches": 8, "noise_batches": 2}
        values["generate"]["max_new_tokens"] = 4
        values["study"] |= {"max_new_tokens": 5, "prompt_tokens": 12, "repeats": 1}
        values["study"]["batch_sizes"] = [1, 3]
        self.file, self.cache = folder / "params.yaml", folder / "cache"
        self.file.write_text(yaml.safe_dump(values))

    def run(self, stage: str, *words: str) -> Result:
        main = import_module(f"stages.{stage}").main
        return CliRunner().invoke(main, ["--params", str(self.file), *words])

    def passes(self, stage: str, *words: str) -> str:
        result = self.run(stage, *words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output


@pytest.fixture(scope="module")
def project(
    teacher_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    """A project with a corpus, a cache and a student, all made by the stages."""
    made = Project(teacher_folder, text_folder, tmp_path_factory.mktemp("project"))
    for stage in ("corpus", "prepare", "train"):
        made.passes(stage)
    return made


def test_cache_passes_the_gate(project: Project) -> None:
    project.passes("verify")
    assert "float16" in project.passes("prepare")  # it is there already


def test_online_training(project: Project) -> None:
    project.passes("train", "--run", "online", "--set", "train.targets=online")


def test_evaluation(project: Project) -> None:
    project.passes("evaluate", "--run", "student")
    metrics = json.loads((project.cache / "evaluate" / "metrics.json").read_text())
    assert 0.0 < metrics["student"]["kl_to_teacher"] < 1.0


PARTS = ("reference", "layer", "rope", "gqa", "cache", "speed")


def test_study(project: Project) -> None:
    parts = [word for name in PARTS for word in ("--part", name)]
    assert "comparisons pass" in project.passes("study", *parts)


@pytest.mark.skipif(HAS_BFLOAT16, reason="for GPUs before Ampere")
@pytest.mark.parametrize(
    ("stage", "key"),
    [("prepare", "prepare.dtype"), ("train", "train.dtype"), ("evaluate", "evaluate.dtype")],
)
def test_bfloat16_is_refused_in_one_sentence(stage: str, key: str, project: Project) -> None:
    words = ["--run", "student"] if stage == "evaluate" else ["--overwrite"]
    result = project.run(stage, *words, "--set", f"{key}=bfloat16")
    assert result.exit_code == 2
    assert f"{key}=bfloat16, but" in result.output
    assert "set" in result.output
    assert "Traceback" not in result.output


def test_generation(project: Project) -> None:
    with stand_in.counting() as counts:
        assert project.passes("generate", "--prompt", "the cat")
    stand_in.show("a text of 4 tokens, with the start of its stage", counts)
