"""Two ranks, over gloo: the losses of one, whatever happens to them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE
from pipeline.errors import ParamsError
from pipeline.logit_cache.reader import CacheReader
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.runtime.ranks import Ranks, join_ranks
from pipeline.target_sources.cached import CachedTargets
from pipeline.training import run as run_module
from pipeline.training.batches import Batch, first_rows
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.distillation import DistillationLoss
from pipeline.training.distributed import clip_gradients, local_gradients, parallelise
from pipeline.training.run import run_training
from tests.helpers import (
    LORA,
    RISING,
    ROOT,
    SMALL,
    change,
    from_folder,
    losses,
    run_with_power_cut,
    weights,
)
from tests.models import make_mistral
from tests.training.ranks import run_ranks, start_ranks, train_stage
from tests.waiting import PATIENCE, wait_until


def train_run(params: Params, name: str) -> None:
    run_training(params, name)


def assert_same_losses(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    """All curves but those of time."""
    first, second = losses(one), losses(two)
    assert first.keys() == second.keys()
    for name, (steps, values) in first.items():
        assert steps == second[name][0]
        # A perplexity is as wrong, relatively, as its loss is in nats.
        bound = {"rel": tolerance} if name.endswith("perplexity") else {"abs": tolerance}
        assert values == pytest.approx(second[name][1], **bound), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
def test_losses_are_those_of_one_rank(
    parallel: str,
    gradient_accumulation_steps: int,
    forkserver: ForkServerContext,
    tiny_cache: Params,
) -> None:
    """Shares of 3 and 2 rows; of the last validation batch, one rank has nothing.

    The largest seed there is: each rank's own goes round.
    """
    train = {
        "batch_rows": 5,
        "eval_rows": 6,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    moving = {"alpha_end": 0.1} if gradient_accumulation_steps == 1 else {}
    params = change(tiny_cache, train=train | moving, run={"parallel": parallel}).model_copy(
        update={"seed": 2**32 - 1}
    )
    run_training(params, "one")
    checkpointing = change(
        params, run={"activation_checkpointing": gradient_accumulation_steps == 2}
    )
    run_ranks(forkserver, 2, train_run, checkpointing, "two")
    one, two = params.paths.runs / "one", params.paths.runs / "two"
    assert_same_losses(one, two)
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(two)[name], atol=1e-5), name
    assert not (two / "checkpoints").exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("adapters", [False, True])
def test_students_of_transformers_train_on_two_ranks(
    adapters: bool,
    parallel: str,
    forkserver: ForkServerContext,
    tiny_cache: Params,
    tmp_path: Path,
) -> None:
    """A whole one; and one that is frozen but for adapters, its blocks computed again."""
    start = make_mistral(tmp_path / "mistral")
    params = from_folder(tiny_cache, start, lora=LORA if adapters else None)
    run_training(params, "one")
    run = {"parallel": parallel, "activation_checkpointing": adapters}
    run_ranks(forkserver, 2, train_run, change(params, run=run), "two")
    one, two = params.paths.runs / "one", params.paths.runs / "two"
    assert_same_losses(one, two)
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(two)[name], atol=1e-5), name


def train_until_cut(params: Params, name: str) -> None:
    run_with_power_cut(params, name, before_step=7)


@pytest.mark.parametrize(("before", "after"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_the_best_weights_are_those_of_one_rank(
    before: str, after: str, forkserver: ForkServerContext, tiny_cache: Params
) -> None:
    """Kept by two ranks, which stop after the best step; read and saved under the other engine."""
    params = change(tiny_cache, train=RISING, run={"parallel": before})
    whole = run_training(params, "one").state
    assert whole is not None
    assert 0 < (whole.best_step or 0) < 6  # in the checkpoint of step 6
    run_ranks(forkserver, 2, train_until_cut, params, "two")
    run_ranks(forkserver, 2, train_run, change(params, run={"parallel": after}), "two")
    one, two = params.paths.runs / "one", params.paths.runs / "two"
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(two)[name], atol=1e-4), name


def gradients_of(step: DistillationLoss) -> dict[str, torch.Tensor]:
    return {
        name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
        for name, p in step.student.named_parameters()
        if p.grad is not None
    }


def make_step(tied: bool) -> DistillationLoss:
    torch.manual_seed(1)
    student = StudentModel(ModelConfig(**SMALL, max_seq_len=32, tie_embeddings=tied))
    return DistillationLoss(student, dtype=torch.float32, head_chunk=7)


def backward(step: Any, batch: Batch, ranks: int, labels: int) -> float:
    total, _, _ = step(batch, alpha=0.5, temperature=2.0, divergence="forward_kl")
    (total * ranks / labels).backward()
    return float(total)


def compare_gradients(params: Params) -> None:
    """On each rank: gradients and norm of two engines against those of the whole batch alone."""
    corpus = CorpusSplit(params.paths.corpus, "train")
    teacher = CachedTargets(CacheReader(params.paths.logits, corpus))
    with join_ranks("cpu") as ranks:
        whole = next(first_rows(teacher, 4, 4))
        whole.labels[2:] = IGNORE  # the second rank has nothing in the loss
        part = next(first_rows(teacher, 4, 4, rank=ranks.rank, world_size=2))
        part.labels[:] = whole.labels[2 * ranks.rank : 2 * ranks.rank + 2]
        for tied in (True, False):
            alone = make_step(tied)
            loss = backward(alone, whole, 1, whole.num_labels)
            expected = gradients_of(alone)
            norm = float(clip_gradients(alone, 1e9))
            for engine in ("ddp", "fsdp"):
                step = make_step(tied)
                model = parallelise(step, ranks, params.run.model_copy(update={"parallel": engine}))
                share = backward(model, part, 2, whole.num_labels)
                assert ranks.sum(share)[0] == pytest.approx(loss, rel=1e-6)
                found = gradients_of(step)
                assert found.keys() == expected.keys()
                for name, gradient in expected.items():
                    assert torch.allclose(found[name], gradient, atol=1e-7), (engine, name)
                assert float(clip_gradients(step, norm / 2)) == pytest.approx(norm, rel=1e-5)
                assert float(clip_gradients(step, 1e9)) == pytest.approx(norm / 2, rel=1e-4)


def accumulate(params: Params) -> None:
    """On each rank: a micro-batch that is not the last is reduced by fsdp alone."""
    corpus = CorpusSplit(params.paths.corpus, "train")
    with join_ranks("cpu") as ranks:
        teacher = CachedTargets(CacheReader(params.paths.logits, corpus))
        part = next(first_rows(teacher, 4, 4, rank=ranks.rank, world_size=2))
        for engine, apart in (("ddp", True), ("fsdp", False)):
            step = make_step(tied=True)
            model = parallelise(step, ranks, params.run.model_copy(update={"parallel": engine}))
            sums = []
            for last in (False, True):
                with local_gradients(model, last=last):
                    backward(model, part, 2, 100)
                sums.append(float(gradients_of(step)["model.norm.weight"].sum()))
            first, both = zip(*ranks.gather(sums), strict=True)
            assert (first[0] != first[1]) == apart
            assert both[0] == both[1]


def test_gradients_are_reduced_once_a_step(
    forkserver: ForkServerContext, tiny_cache: Params
) -> None:
    run_ranks(forkserver, 2, accumulate, tiny_cache)


def test_gradients_are_those_of_the_whole_batch(
    forkserver: ForkServerContext, tiny_cache: Params
) -> None:
    """Of a tied head too, which is embedding and head at once; and where a rank has no labels."""
    run_ranks(forkserver, 2, compare_gradients, tiny_cache)


def bad_on_one_rank(params: Params, out: Path) -> None:
    original = DistillationLoss.forward
    calls = iter(range(10**6))

    def poisoned(self, batch, **options):  # type: ignore[no-untyped-def]
        total, ce, kl = original(self, batch, **options)
        bad = torch.is_grad_enabled() and next(calls) == 2 and os.environ["RANK"] == "1"
        return (total * float("inf") if bad else total), ce, kl

    DistillationLoss.forward = poisoned  # type: ignore[method-assign]
    state = run_training(params, "poisoned").state
    assert state is not None
    (out / os.environ["RANK"]).write_text(json.dumps([state.skipped, state.history[-1]["step"]]))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_bad_loss_on_one_rank_is_skipped_by_all(
    parallel: str, forkserver: ForkServerContext, tiny_cache: Params, tmp_path: Path
) -> None:
    params = change(tiny_cache, run={"parallel": parallel})
    run_ranks(forkserver, 2, bad_on_one_rank, params, tmp_path)
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [[1, 8.0]] * 2
    for tensor in weights(params.paths.runs / "poisoned").values():
        assert bool(torch.isfinite(tensor).all())


def lines(log: Path, rank: int) -> list[str]:
    text = (log / str(rank)).read_text()
    assert "Traceback" not in text, text
    return text.splitlines()


LONG = ("--set", "train.steps=30", "--set", "run.checkpoint_every=3")


@pytest.mark.parametrize(("before", "after"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_one_rank_is_killed_and_the_run_goes_on(
    before: str, after: str, forkserver: ForkServerContext, tiny_cache: Params, tmp_path: Path
) -> None:
    """SIGKILL at a random moment; then two ranks under the other engine, killed again; then one."""
    words = ["--params", str(tmp_path / "params.yaml"), *LONG]
    runs, log = tiny_cache.paths.runs, tmp_path / "log"
    checkpoints = Checkpoints(runs / "killed" / "checkpoints")
    chance = random.Random(before)
    for engine, victim in ((before, 1), (after, 0)):
        newest = checkpoints.names()[-1:]
        command = (train_stage, log, *words, "--set", f"run.parallel={engine}", "--run", "killed")
        with start_ranks(forkserver, 2, *command) as processes:
            wait_until(lambda newest=newest: checkpoints.names()[-1:] != newest)
            time.sleep(chance.uniform(0.0, 0.2))
            processes[victim].kill()
            processes[1 - victim].join(PATIENCE)
            assert processes[1 - victim].exitcode == 1
        errors = [line for line in lines(log, 1 - victim) if line.startswith("error: ")]
        assert len(errors) == 1
        assert f"error: rank {1 - victim}: the connection to another rank broke" in errors[0]
    run_ranks(forkserver, 1, train_stage, log, *words, "--run", "killed")
    assert any("continuing from step" in line for line in lines(log, 0))
    assert any(line.startswith("2 ranks saved what 1 continue") for line in lines(log, 0))
    run_ranks(forkserver, 1, train_stage, log, *words, "--run", "whole")
    assert_same_losses(runs / "killed", runs / "whole")


def test_torchrun_starts_again_what_was_killed(tiny_cache: Params, tmp_path: Path) -> None:
    """The command of docs/guide.md; `--` since torchrun would take --run for its own --run-path."""
    words = ["--params", str(tmp_path / "params.yaml"), *LONG, "--set", "run.parallel=fsdp"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "--monitor-interval", "0.1", "--standalone"]
    command += ["--", str(ROOT / "stages/train.py"), *words, "--run", "restarted"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    runs = tiny_cache.paths.runs
    wait_until(Checkpoints(runs / "restarted" / "checkpoints").names)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert output.count("continuing from step") == 1
    assert output.count("holds 0.1 M parameters") == 1
    run_training(change(tiny_cache, train={"steps": 30}, run={"checkpoint_every": 3}), "whole")
    assert_same_losses(runs / "restarted", runs / "whole")


def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    forkserver: ForkServerContext, tiny_cache: Params, tmp_path: Path
) -> None:
    words = ["--params", str(tmp_path / "params.yaml"), "--set", "train.steps=5000"]
    words += ["--set", "run.checkpoint_every=1000", "--set", "run.parallel=fsdp"]
    folder, log = tiny_cache.paths.runs / "student", tmp_path / "log"
    with start_ranks(forkserver, 2, train_stage, log, *words) as processes:
        wait_until((folder / "dvclive/plots/metrics/train/loss.tsv").exists)
        assert processes[1].pid is not None
        os.kill(processes[1].pid, signal.SIGTERM)
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 130
    assert len(Checkpoints(folder / "checkpoints").names()) == 1
    assert any("run the same command to continue" in line for line in lines(log, 0))
    assert lines(log, 1) == []  # only rank 0 talks


def broken_teacher(log: Path, *words: str) -> None:
    original = CachedTargets.targets

    def fails(self, places, tokens):  # type: ignore[no-untyped-def]
        if os.environ["RANK"] == "1" and torch.is_grad_enabled():
            raise ParamsError("the disk of this machine has melted")
        return original(self, places, tokens)

    CachedTargets.targets = fails  # type: ignore[method-assign]
    train_stage(log, *words)


def test_an_error_on_one_rank_ends_all(
    forkserver: ForkServerContext, tiny_cache: Params, tmp_path: Path
) -> None:
    words = ["--params", str(tmp_path / "params.yaml")]
    log = tmp_path / "log"
    with start_ranks(forkserver, 2, broken_teacher, log, *words) as processes:
        for process in processes:
            process.join(PATIENCE)
        assert [process.exitcode for process in processes] == [1, 2]
    assert "error: rank 1: the disk of this machine has melted" in lines(log, 1)
    assert any("the connection to another rank broke" in line for line in lines(log, 0))


def test_what_rank_0_refuses_is_said_once(
    forkserver: ForkServerContext, tiny_cache: Params, tmp_path: Path
) -> None:
    run_training(tiny_cache, "student")
    words = ["--params", str(tmp_path / "params.yaml"), "--set", "train.temperature=2"]
    log = tmp_path / "log"
    with start_ranks(forkserver, 2, train_stage, log, *words) as processes:
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 1
    assert sum("holds a run with other parameters" in line for line in lines(log, 0)) == 1
    assert lines(log, 1) == []


def test_fewer_rows_than_ranks_are_refused(tiny_cache: Params) -> None:
    ranks = Ranks(torch.device("cpu"), rank=1, world_size=5)
    with pytest.raises(ParamsError, match=r"batch_rows=4 rows cannot be shared among 5 ranks"):
        run_module._require_rows(tiny_cache, ranks)
