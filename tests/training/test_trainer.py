"""Training: exact resume, accumulation, bad steps, the three teachers."""

from __future__ import annotations

import functools
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.logit_cache.reader import CacheReader
from pipeline.losses.reference import cross_entropy, tail_bucket_kl
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.runtime.ranks import ALONE
from pipeline.target_sources.cached import CachedTargets
from pipeline.target_sources.tokens_only import TokensOnly
from pipeline.training.batches import BatchStream, first_rows
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.distillation import DistillationLoss
from pipeline.training.distributed import parallelise
from pipeline.training.run import run_training
from pipeline.training.students import RunStudent
from pipeline.training.trainer import forwards_a_batch
from pipeline.training.validation import validate
from tests.helpers import (
    RISING,
    ROOT,
    SMALL,
    assert_same_run,
    capture_all,
    change,
    losses,
    run_with_power_cut,
    weights,
)
from tests.waiting import PATIENCE, wait_until


@pytest.mark.parametrize(("alpha", "falls"), [(0.0, "loss"), (1.0, "kl")])
def test_what_is_minimised_falls(alpha: float, falls: str, tiny_cache: Params) -> None:
    params = change(tiny_cache, train={"steps": 30, "eval_every": 10, "alpha": alpha})
    state = run_training(params, "student").state
    assert state is not None
    curve = [r[f"validation/{falls}"] for r in state.history if "validation/loss" in r]
    assert len(curve) == 4
    assert curve[-1] < 0.9 * curve[0]


def test_interrupted_run_continues_exactly(tiny_cache: Params) -> None:
    student = {"init": "random"} | SMALL | {"dropout": 0.1}
    params = change(tiny_cache, student=student)
    run_training(params, "whole")
    run_with_power_cut(params, "broken", before_step=5)
    broken = params.paths.runs / "broken"
    assert Checkpoints(broken / "checkpoints").names() == [
        "step_00000002",
        "step_00000004",
    ]
    run_training(params, "broken")
    assert_same_run(broken, params.paths.runs / "whole")


def test_ctrl_c_saves_and_continues(tiny_cache: Params, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "stages/train.py"), "--params"]
    command += [str(tmp_path / "params.yaml"), "--set", "train.steps=5000"]
    command += ["--set", "run.checkpoint_every=1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    curves = tiny_cache.paths.runs / "student" / "dvclive" / "plots" / "metrics" / "train"
    wait_until((curves / "loss.tsv").exists)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "run the same command to continue" in errors
    assert "Traceback" not in errors
    assert Checkpoints(tiny_cache.paths.runs / "student" / "checkpoints").names()


def test_accumulation_changes_nothing_but_memory(tiny_cache: Params) -> None:
    """4 rows at once, and 2 + 2: the loss is divided once, by all tokens of the step."""
    whole = run_training(tiny_cache, "whole").state
    parts = run_training(
        change(
            tiny_cache, train={"batch_rows": 2, "gradient_accumulation_steps": 2, "eval_rows": 8}
        ),
        "parts",
    ).state
    assert whole is not None
    assert parts is not None
    for one, two in zip(whole.history, parts.history, strict=True):
        for key in one.keys() & {"train/loss", "train/divergence", "validation/loss"}:
            assert one[key] == pytest.approx(two[key], abs=1e-5)


@pytest.mark.parametrize("document_mask", [True, False])
def test_online_and_cached_teacher_give_the_same_losses(
    document_mask: bool, tiny_corpus: Params
) -> None:
    params = change(tiny_corpus, prepare={"document_mask": document_mask})
    capture_all(params)
    for temperature in (1.0, 2.0):
        train = {"temperature": temperature, "k": 8}
        cached = run_training(change(params, train=train), f"cached{temperature}").state
        online = run_training(
            change(params, train=train | {"targets": "online"}), f"online{temperature}"
        ).state
        assert cached is not None
        assert online is not None
        for one, two in zip(cached.history, online.history, strict=True):
            for key in one.keys() & {"train/loss", "train/divergence", "validation/kl"}:
                assert one[key] == pytest.approx(two[key], abs=1e-3)


def test_a_cached_run_attends_as_its_cache_did(tiny_corpus: Params) -> None:
    """Whatever prepare.document_mask says now; a run without a cache does as it says."""
    packed = change(tiny_corpus, prepare={"document_mask": False}, train={"steps": 2})
    capture_all(packed)
    now_apart = change(packed, prepare={"document_mask": True})
    states = [
        run_training(params, name, overwrite=True).state
        for name, params in (("one", packed), ("two", now_apart))
    ]
    assert losses(packed.paths.runs / "one") == losses(packed.paths.runs / "two")
    alone = {"train": {"steps": 2, "targets": "none"}}
    other = [
        run_training(change(p, **alone), "alone", overwrite=True).state for p in (packed, now_apart)
    ]
    assert all(state is not None for state in [*states, *other])
    assert other[0].history[0] != other[1].history[0]  # type: ignore[union-attr]


def test_the_best_weights_are_kept(
    tiny_cache: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def watched(model: torch.nn.Module, *args: object) -> dict[str, float]:
        of_student = model.student.state_dict().items()  # type: ignore[union-attr, operator]
        seen[len(seen)] = {name: tensor.clone() for name, tensor in of_student}
        return validate(model, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("pipeline.training.trainer.validate", watched)
    result = run_training(change(tiny_cache, train=RISING), "student")
    assert result.state is not None
    curve = [point["validation/loss"] for point in result.state.history]
    best = min(range(len(curve)), key=curve.__getitem__)
    assert 0 < best < 8
    assert (result.state.best_step, result.state.best_loss) == (best, curve[best])
    assert result.state.history[-1]["validation/best_step"] == best
    printed = capsys.readouterr().out
    for step in range(1, 9):
        lowest = curve[step] < min(curve[:step])
        (line,) = (text for text in printed.splitlines() if f"step {step}/8: " in text)
        assert line.endswith(", the best yet") is lowest
    for name, tensor in weights(result.folder).items():
        assert torch.equal(tensor, seen[best][name]), name
        assert not torch.equal(tensor, seen[8][name]), name


def test_a_start_that_training_only_spoils_is_kept(tiny_cache: Params) -> None:
    spoilt = RISING | {"learning_rate": 3.0, "warmup_steps": 0, "steps": 2}
    result = run_training(change(tiny_cache, train=spoilt), "student")
    assert result.state is not None
    assert result.state.best_step == 0


@pytest.mark.parametrize("before_step", [3, 7])
def test_the_best_survives_a_resume(before_step: int, tiny_cache: Params) -> None:
    """Whether the best step comes before or after the checkpoint that is continued."""
    params = change(tiny_cache, train=RISING)
    whole = run_training(params, "whole").state
    run_with_power_cut(params, "broken", before_step=before_step)
    state = run_training(params, "broken").state
    assert whole is not None
    assert state is not None
    assert state.best_step == whole.best_step
    assert_same_run(params.paths.runs / "broken", params.paths.runs / "whole")


def test_validation_logs_perplexity(tiny_cache: Params, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_training(change(tiny_cache, train={"steps": 1}), "student")
    assert result.state is not None
    last = result.state.history[-1]
    assert last["validation/perplexity"] == pytest.approx(math.exp(last["validation/loss"]))
    assert f"validation/perplexity {last['validation/perplexity']:.4f}" in capsys.readouterr().out
    written = json.loads((result.folder / "dvclive" / "metrics.json").read_text())
    assert written["validation"]["perplexity"] == last["validation/perplexity"]


@pytest.mark.parametrize(
    ("lora", "checkpointing", "count"),
    [(False, False, 3), (False, True, 4), (True, False, 2), (True, True, 3)],
)
def test_time_left_counts_what_a_batch_computes(
    lora: bool, checkpointing: bool, count: int, tiny_params: Params
) -> None:
    adapters = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj"]}
    params = change(
        tiny_params,
        student={"lora": adapters if lora else None},
        run={"activation_checkpointing": checkpointing},
    )
    assert forwards_a_batch(params) == count


def test_no_teacher_needs_no_cache(tiny_corpus: Params) -> None:
    state = run_training(change(tiny_corpus, train={"targets": "none"}), "plain").state
    assert state is not None
    assert "train/divergence" not in state.history[-1]
    assert state.history[-1]["train/loss"] == pytest.approx(state.history[-1]["train/ce"])


def test_bad_steps_are_skipped_counted_and_fatal_in_the_end(
    tiny_cache: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DistillationLoss.forward
    calls = iter(range(10**6))

    def poisoned(self, batch, **options):  # type: ignore[no-untyped-def]
        total, ce, kl = original(self, batch, **options)
        bad = torch.is_grad_enabled() and next(calls) in (2, 3)
        return (total * float("nan") if bad else total), ce, kl

    monkeypatch.setattr(DistillationLoss, "forward", poisoned)
    state = run_training(tiny_cache, "poisoned").state
    assert state is not None
    assert state.skipped == 2
    for tensor in weights(tiny_cache.paths.runs / "poisoned").values():
        assert bool(torch.isfinite(tensor).all())
    calls = iter(range(10**6))
    with pytest.raises(DecantError, match=r"2 steps had .* run\.max_skipped_steps=1"):
        run_training(change(tiny_cache, run={"max_skipped_steps": 1}), "fatal")


def test_a_student_that_overflowed_is_not_saved(tiny_cache: Params) -> None:
    """In fewer steps than may be skipped: each further one is, since weights are not finite."""
    broken = change(tiny_cache, train={"learning_rate": 1e38, "warmup_steps": 0, "eval_every": 8})
    with pytest.raises(DecantError, match=r"validation loss is nan, .* train\.learning_rate"):
        run_training(broken, "student")
    assert not (tiny_cache.paths.runs / "student" / "model").exists()


@pytest.mark.parametrize(("k", "num_sampled"), [(8, 8), (0, 30)])
def test_training_on_draws(
    k: int, num_sampled: int, tiny_corpus: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cached and online teachers draw the same ids, so they train the same."""
    params = change(tiny_corpus, prepare={"k": k, "num_sampled": num_sampled}, train={"steps": 4})
    capture_all(params)
    cached = run_training(params, "cached").state
    online = run_training(change(params, train={"targets": "online"}), "online").state
    assert cached is not None
    assert online is not None
    for one, two in zip(cached.history, online.history, strict=True):
        for name in ("validation/loss", "validation/kl"):
            if name in one:
                assert one[name] == pytest.approx(two[name], abs=5e-3)
    assert "warning" not in capsys.readouterr().out
    run_training(change(params, train={"temperature": 2.0, "steps": 1}), "warm")
    assert "sampled ids were taken at temperature 1" in capsys.readouterr().out


@pytest.mark.parametrize("targets", ["cached", "online"])
def test_positions_without_a_target_count_in_cross_entropy_alone(
    targets: str, tiny_corpus: Params
) -> None:
    """The divergence is the mean over half of the positions, CE over all, in one step's loss."""
    prepare = {"positions": "high_entropy", "entropy_quantile": 0.5, "top_p": 0.8}
    params = change(
        tiny_corpus,
        prepare=prepare,
        train={"targets": targets, "alpha": 0.6, "steps": 1, "gradient_accumulation_steps": 2},
    )
    capture_all(params)
    state = run_training(params, "half").state
    assert state is not None
    step = next(values for values in state.history if "train/loss" in values)
    total = 0.6 * step["train/divergence"] + 0.4 * step["train/ce"]
    assert step["train/loss"] == pytest.approx(total, rel=1e-6)

    source = CachedTargets(
        CacheReader(params.paths.logits, CorpusSplit(params.paths.corpus, "train"))
    )
    stream = BatchStream(
        source,
        batch_rows=params.train.batch_rows,
        window_shards=params.train.shuffle_shards,
        seed=0,
    )
    batches = list(islice(stream.starting_at(0), 2))
    torch.manual_seed(params.seed)
    student = RunStudent(params, source.corpus, source.corpus).model
    divergence, ce, num_targets, num_labels = 0.0, 0.0, 0, 0
    for batch in batches:
        assert batch.topk is not None
        hidden = student.hidden_states(batch.tokens, batch.doc_ids).detach()
        logits = (hidden @ student.head_weight.detach().T).flatten(0, 1)
        there, labels = batch.topk.has_target.flatten(), batch.labels.flatten()
        topk = batch.topk.map(lambda t: t.flatten(0, 1))
        divergence += float(tail_bucket_kl(logits[there], topk[there], 1.0).sum())
        ce += float(cross_entropy(logits[labels != IGNORE], labels[labels != IGNORE]).sum())
        assert batch.num_targets == int(there.sum())
        num_targets, num_labels = num_targets + int(there.sum()), num_labels + batch.num_labels
    assert 0.45 < num_targets / num_labels < 0.6
    assert step["train/divergence"] == pytest.approx(divergence / num_targets, rel=1e-3)
    assert step["train/ce"] == pytest.approx(ce / num_labels, rel=1e-4)


def test_the_divergence_is_what_is_trained_and_kl_what_is_validated(tiny_cache: Params) -> None:
    train = {"steps": 2, "eval_every": 2, "alpha": 1.0}
    histories = {}
    for name in ("forward_kl", "total_variation"):
        state = run_training(change(tiny_cache, train=train | {"divergence": name}), name).state
        assert state is not None
        histories[name] = state.history
    kl, variation = (history[1]["train/divergence"] for history in histories.values())
    assert variation != pytest.approx(kl, rel=0.1)
    # Pinsker's inequality holds between the two sides of each position, so between their means.
    assert variation <= (kl / 2.0) ** 0.5
    assert histories["total_variation"][1]["train/loss"] == pytest.approx(variation)
    first = [history[0]["validation/kl"] for history in histories.values()]
    assert first[0] == first[1]


def test_draws_with_another_divergence_are_refused_before_the_first_step(
    tiny_corpus: Params,
) -> None:
    params = change(
        tiny_corpus, prepare={"k": 8, "num_sampled": 8}, train={"divergence": "skew_kl"}
    )
    capture_all(params)
    with pytest.raises(MismatchError, match=r"divergence=skew_kl .* prepare\.num_sampled=0"):
        run_training(params, "student")
    assert not (params.paths.runs / "student" / "dvclive").exists()


COMPILED = [
    "aot_eager",  # everything but the code generator, which takes most of the time
    pytest.param("inductor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_and_recomputed_blocks_change_nothing(
    checkpointing: bool, backend: str, tiny_cache: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_training(tiny_cache, "plain").state
    compiled: list[object] = []
    compile_with = functools.partial(torch.compile, backend=backend)

    def counted(function: Callable[..., object]) -> object:
        compiled.append(function)
        return compile_with(function)

    monkeypatch.setattr(torch, "compile", counted)
    run = {"compile": True, "activation_checkpointing": checkpointing}
    state = run_training(change(tiny_cache, run=run), "compiled").state
    assert len(compiled) == 2  # blocks
    assert plain is not None
    assert state is not None
    for one, two in zip(plain.history, state.history, strict=True):
        for name in ("train/loss", "train/gradient_norm", "validation/loss"):
            assert one.get(name) == pytest.approx(two.get(name), abs=1e-5)


def test_recomputing_keeps_less(tiny_cache: Params) -> None:
    """Bytes that autograd holds until backward, but for the weights and each block's input."""
    corpus = CorpusSplit(tiny_cache.paths.corpus, "train")
    batch = next(first_rows(TokensOnly(corpus, shard_rows=16, document_mask=False), 4, 4))
    kept = []
    for checkpointing in (False, True):
        student = StudentModel(ModelConfig(**SMALL, max_seq_len=32))
        step = DistillationLoss(student, dtype=torch.float32, head_chunk=50)
        run = tiny_cache.run.model_copy(update={"activation_checkpointing": checkpointing})
        model = parallelise(step, ALONE, run)
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(batch, alpha=0.0, temperature=1.0, divergence="forward_kl")
        weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
        kept.append(sum(size for place, size in sizes.items() if place not in weights))
    assert kept[1] < 0.5 * kept[0]


def test_no_compiler_is_one_sentence(tiny_cache: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ParamsError, match=r"no-such-compiler is not found.* run\.compile=false"):
        run_training(change(tiny_cache, run={"compile": True}), "student")
