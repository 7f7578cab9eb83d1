"""Every benchmark runs, at its smallest: tiny corpus, cache and run, one round of a few rows."""

from __future__ import annotations

import importlib
import shutil
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.config.params import Params
from pipeline.model.folder import teacher_folder
from pipeline.training.run import run_training
from tests.models import CHATML

FOLDER = Path(__file__).parent / "benchmarks"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "measure")
TINY_RUNS = {  # options, and what it must print
    "attention_cost": ("--rows 2 --rounds 1", "teacher's validation loss: row "),
    "cache_memory": ("--rows 32", "corpus x16  read "),
    "cache_speed": ("--rounds 1 --batches 2", "share of a training step: median "),
    "capture_cost": ("--rows 2 --rounds 1 --peak 1", "of the peak FLOP/s"),
    "corpus_speed": ("--megabytes 0.2 --rounds 1", "texts: 2 workers are "),
    "chat_capture": ("--conversations 30 --rounds 1", "answers alone over all positions: time "),
    "engine_cost": ("--rows 2 --rounds 1", "by vLLM 1.2.3, over transformers': "),
    "float16_curve": ("--steps 2 --size 32", "float16 against float32: training loss at most "),
    "head_and_loss": ("--case tiny --rounds 1", "of torch.topk's time"),
    "head_memory": ("--tokens 64 --vocabulary 512 --size 32", "DistillKit's KL, missing uniform"),
    "model_speed": ("--shape tiny --rounds 1 --rows 1 --length 8", "decode, batch 8 "),
    "on_policy": (
        "--prompts 60 --prompt-tokens 12 --new-tokens 8 --steps 2 --gradient-rollouts 3",
        "| reverse KL | ",
    ),
    "online_step": ("--case tiny --rounds 1", "online, dense, teacher of 4.3x the size "),
    "quality": ("--work quality --seeds 1 --steps 1", "| dense, live teacher | 600.0 "),
    "reduce_speed": ("--case tiny --rounds 1", "of the product of 3584"),
    "sharded_memory": (
        "--limit 1500 --size 4 --hidden 32 --processes 2 --way tensor",
        "2 processes under 1,500 MiB each, tensor: exit status 0",
    ),
    "sweep_cost": ("--runs 1 --steps 1", "online over cached, capture included: "),
    "targets": ("", "cosine of sorted top-K logits between unrelated positions: "),
}


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(
    name: str,
    tiny_cache: Params,
    tmp_path: Path,
    forkserver: ForkServerContext,  # from which peaks are measured
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    assert name in TINY_RUNS, f"tests/benchmarks/{name}.py has no tiny run: give it one here"
    words, printed = TINY_RUNS[name]
    if name in ("cache_speed", "on_policy"):
        run_training(tiny_cache, "student")
    if name == "engine_cost":
        monkeypatch.setenv("DECANT_TEST_VLLM", str(request.getfixturevalue("vllm_python")))
    if name == "chat_capture":
        chatty = shutil.copytree(teacher_folder(tiny_cache.paths.teacher), tmp_path / "chatty")
        (chatty / "chat_template.jinja").write_text(CHATML)
        words += f" --set paths.teacher={chatty}"
    monkeypatch.chdir(tmp_path)  # where params.yaml lies
    monkeypatch.syspath_prepend(str(FOLDER))
    try:
        main = importlib.import_module(name).main
        done = CliRunner().invoke(main, words.split(), catch_exceptions=False)
    finally:  # as scripts they are no modules of the tests
        for module in [*NAMES, "measure"]:
            sys.modules.pop(module, None)
    assert done.exit_code == 0, done.output
    assert printed in done.output
