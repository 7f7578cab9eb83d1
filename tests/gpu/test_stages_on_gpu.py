"""Every stage on a GPU: each must run to its end, and what it computes must be the CPU's.

python -m pytest -m gpu
"""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from click.testing import CliRunner

from pipeline.config.params import Params
from pipeline.config.train_params import Divergence
from pipeline.io.files import read_json_object
from pipeline.targets.topk import TopK
from tests.helpers import LORA, ROOT, change, open_cache

pytestmark = pytest.mark.gpu


def on_gpu(params: Params, **sections: dict[str, Any]) -> Params:
    """Params of the tiny pipeline on a GPU, every number format `auto` unless changed."""
    automatic = {name: {"dtype": "auto"} for name in ("prepare", "train", "evaluate", "humaneval")}
    changed = {
        name: automatic.get(name, {}) | sections.get(name, {})
        for name in automatic.keys() | sections.keys()
    }
    return change(params, **changed).model_copy(update={"device": "cuda"})


def run(stage: str, params: Params, *words: str) -> str:
    """Run a stage in this process; it must succeed. Returns what it printed."""
    file = params.paths.corpus.parent / "params-gpu.yaml"
    file.write_text(yaml.safe_dump(params.model_dump(mode="json")))
    main = importlib.import_module(f"stages.{stage}").main
    done = CliRunner().invoke(main, ["--params", str(file), *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def metrics_of(params: Params, name: str = "student") -> dict[str, Any]:
    return read_json_object(params.paths.runs / name / "dvclive" / "metrics.json")


def stored(params: Params) -> TopK:
    """The first four rows of a cache."""
    reader = open_cache(params)
    shard = reader.shard(0)
    return reader.gather([(shard, row) for row in range(4)])


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("num_sampled", [0, 5])
def test_a_cache_passes_the_gate(tiny_corpus: Params, dtype: str, num_sampled: int) -> None:
    params = on_gpu(tiny_corpus, prepare={"dtype": dtype, "num_sampled": num_sampled})
    run("prepare", params)
    run("verify", params)
    assert bool(torch.isfinite(stored(params).logprobs).all())


def test_a_cache_of_the_gpu_is_that_of_the_cpu(tiny_corpus: Params, tmp_path: Path) -> None:
    """In float32, with documents kept apart, and each other's gate accepts it."""
    wanted = {"prepare": {"dtype": "float32", "document_mask": True, "num_sampled": 5}}
    gpu = on_gpu(tiny_corpus, **wanted)
    run("prepare", gpu)
    run("verify", gpu.model_copy(update={"device": "cpu"}))
    elsewhere = gpu.paths.model_copy(update={"logits": tmp_path / "of-cpu"})
    cpu = gpu.model_copy(update={"device": "cpu", "paths": elsewhere})
    run("prepare", cpu)
    run("verify", cpu.model_copy(update={"device": "cuda:0"}))
    torch.testing.assert_close(stored(gpu).lse, stored(cpu).lse, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_divergence_trains(
    tiny_cache: Params, divergence: Divergence, temperature: float
) -> None:
    recipe = {"divergence": divergence, "temperature": temperature}
    params = on_gpu(tiny_cache, prepare={"dtype": "float32"}, train=recipe)
    run("train", params)
    assert math.isfinite(metrics_of(params)["train"]["loss"])


TRAINED: dict[str, dict[str, Any]] = {
    "float32": {"train": {"dtype": "float32"}},
    "bfloat16": {"train": {"dtype": "bfloat16"}},
    "float16": {"train": {"dtype": "float16"}},
    "cross-entropy alone": {"train": {"targets": "none"}},
    "a live teacher": {"train": {"targets": "online"}, "prepare": {"dtype": "auto"}},
    "adapters": {"student": {"lora": LORA}},
    "accumulation": {"train": {"gradient_accumulation_steps": 2}},
    "activation checkpointing": {"run": {"activation_checkpointing": True}},
    "torch.compile": {"run": {"compile": True}},
}


@pytest.mark.parametrize("how", TRAINED)
def test_training_in_every_way(tiny_cache: Params, how: str) -> None:
    sections = {"prepare": {"dtype": "float32"}} | TRAINED[how]
    params = on_gpu(tiny_cache, **sections)
    run("train", params)
    assert math.isfinite(metrics_of(params)["train"]["loss"])


def test_a_student_learns_on_the_gpu_as_on_the_cpu(tiny_cache: Params) -> None:
    """The same losses in float32, within what the order of sums changes."""
    gpu = on_gpu(tiny_cache, prepare={"dtype": "float32"}, train={"dtype": "float32"})
    run("train", gpu, "--run", "gpu")
    run("train", gpu.model_copy(update={"device": "cpu"}), "--run", "cpu")
    ours, theirs = (metrics_of(gpu, name) for name in ("gpu", "cpu"))
    for name in ("loss", "kl"):
        assert ours["validation"][name] == pytest.approx(theirs["validation"][name], rel=2e-3)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_group_of_one_rank_learns_as_one_process_does(tiny_cache: Params, parallel: str) -> None:
    params = on_gpu(tiny_cache, prepare={"dtype": "float32"}, train={"dtype": "float32"})
    run("train", params, "--run", "alone")
    file = params.paths.corpus.parent / "params-gpu.yaml"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--"]
    words = ["--params", str(file), "--run", "grouped", "--set", f"run.parallel={parallel}"]
    done = subprocess.run(
        [*command, "stages/train.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    alone, grouped = (metrics_of(params, name) for name in ("alone", "grouped"))
    for name in ("loss", "kl"):
        expected = alone["validation"][name]
        assert grouped["validation"][name] == pytest.approx(expected, rel=1e-3)


def test_what_follows_a_run(tiny_cache: Params) -> None:
    params = on_gpu(tiny_cache, prepare={"dtype": "float32"})
    run("train", params)
    run("train", params, "--run", "baseline", "--set", "train.targets=none")
    run("evaluate", params)
    run("generate", params, "--prompt", "the cat", "--set", "generate.max_new_tokens=8")
    run("study", params, "--set", "study.prompt_tokens=16", "--set", "study.max_new_tokens=8")
    run("advise", params)
    run("export", params)
