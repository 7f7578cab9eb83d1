"""Training: exact resume, accumulation, bad steps, the three teachers."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import Params, TrainParams
from pipeline.data.packing import IGNORE, PADDING
from pipeline.data.rows import CorpusSplit
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.report import read_curves
from pipeline.storage import open_folder
from pipeline.store.reader import Shard
from pipeline.teacher.base import NoTeacher, corpus_shard
from pipeline.teacher.cached import CachedTeacher
from pipeline.training import trainer
from pipeline.training.batches import BatchStream, make_batch
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.optim import build_optimizer, learning_rate
from pipeline.training.run import build_student, run_training
from tests.conftest import ROOT, change, make_teacher
from tests.helpers import capture_all, open_cache


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def losses(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    curves = read_curves(folder / "dvclive" / "plots" / "metrics")
    return {
        name: curve for name, curve in curves.items() if "second" not in name and "wait" not in name
    }


def assert_same_run(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(("alpha", "falls"), [(0.0, "loss"), (1.0, "kl")])
def test_what_is_minimised_falls(alpha: float, falls: str, tiny_cache: Params) -> None:
    params = change(tiny_cache, train={"steps": 30, "eval_every": 10, "alpha": alpha})
    state = run_training(params, "student").state
    assert state is not None
    curve = [r[f"validation/{falls}"] for r in state.history if "validation/loss" in r]
    assert len(curve) == 4
    assert curve[-1] < 0.9 * curve[0]


def test_the_model_folder_is_complete_and_a_finished_run_is_left_alone(tiny_cache: Params) -> None:
    result = run_training(tiny_cache, "student")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {
        file.name for file in (result.folder / "model").iterdir()
    }
    assert not (result.folder / "checkpoints").exists()
    assert run_training(tiny_cache, "student").state is None


def test_interrupted_run_continues_exactly(
    tiny_cache: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = change(tiny_cache, student={"init": "random"} | SMALL | {"dropout": 0.1})
    run_training(params, "whole")
    step = trainer._train_step

    def dies(*args: object, **options: object) -> object:
        if args[3] == 5:
            raise RuntimeError("power cut")
        return step(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "_train_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        run_training(params, "broken")
    monkeypatch.undo()
    broken = params.paths.runs / "broken"
    assert Checkpoints(broken / "checkpoints").names() == [
        "step_00000002",
        "step_00000004",
    ]
    run_training(params, "broken")
    assert_same_run(broken, params.paths.runs / "whole")


SMALL = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 304,
}


def test_killed_process_continues_exactly(tiny_cache: Params, tmp_path: Path) -> None:
    """SIGKILL at a moment nobody chose, then the same command again."""
    changes = ["train.steps=40", "train.checkpoint_every=3", "train.eval_every=20"]
    command = [sys.executable, str(ROOT / "stages/train.py"), "--params"]
    command += [str(tmp_path / "params.yaml")]
    for text in changes:
        command += ["--set", text]
    process = subprocess.Popen(
        [*command, "--run", "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    killed = tiny_cache.paths.runs / "killed"
    deadline = time.monotonic() + 120
    while not Checkpoints(killed / "checkpoints").names() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model").exists()
    for run in ("killed", "whole"):
        subprocess.run([*command, "--run", run], check=True, capture_output=True)
    assert_same_run(killed, tiny_cache.paths.runs / "whole")


def test_ctrl_c_saves_and_continues(tiny_cache: Params, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "stages/train.py"), "--params"]
    command += [str(tmp_path / "params.yaml"), "--set", "train.steps=5000"]
    command += ["--set", "train.checkpoint_every=1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    curves = tiny_cache.paths.runs / "student" / "dvclive" / "plots" / "metrics" / "train"
    deadline = time.monotonic() + 120
    while not (curves / "loss.tsv").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command to continue" in errors
    assert "Traceback" not in errors
    assert Checkpoints(tiny_cache.paths.runs / "student" / "checkpoints").names()


def test_accumulation_changes_nothing_but_memory(tiny_cache: Params) -> None:
    """4 rows at once, and 2 + 2: the loss is divided once, by all tokens of the step."""
    whole = run_training(tiny_cache, "whole").state
    parts = run_training(
        change(tiny_cache, train={"batch_rows": 2, "accumulation": 2, "eval_rows": 8}), "parts"
    ).state
    assert whole is not None
    assert parts is not None
    for one, two in zip(whole.history, parts.history, strict=True):
        for key in one.keys() & {"train/loss", "train/kl", "validation/loss"}:
            assert one[key] == pytest.approx(two[key], abs=1e-5)


@pytest.mark.parametrize("attention", ["documents", "packed"])
def test_online_and_cached_teacher_give_the_same_losses(
    attention: str, tiny_corpus: Params
) -> None:
    params = change(tiny_corpus, prepare={"attention": attention})
    capture_all(params)
    for temperature in (1.0, 2.0):
        train = {"temperature": temperature, "k": 8}
        cached = run_training(change(params, train=train), f"cached{temperature}").state
        online = run_training(
            change(params, train=train | {"teacher": "online"}), f"online{temperature}"
        ).state
        assert cached is not None
        assert online is not None
        for one, two in zip(cached.history, online.history, strict=True):
            for key in one.keys() & {"train/loss", "train/kl", "validation/kl"}:
                assert one[key] == pytest.approx(two[key], abs=1e-3)


def test_a_cached_run_attends_as_its_cache_did(tiny_corpus: Params) -> None:
    """Whatever prepare.attention says now; a run without a cache does as it says."""
    packed = change(tiny_corpus, prepare={"attention": "packed"}, train={"steps": 2})
    capture_all(packed)
    now_apart = change(packed, prepare={"attention": "documents"})
    states = [
        run_training(params, name, overwrite=True).state
        for name, params in (("one", packed), ("two", now_apart))
    ]
    assert losses(packed.paths.runs / "one") == losses(packed.paths.runs / "two")
    alone = {"train": {"steps": 2, "teacher": "none"}}
    other = [
        run_training(change(p, **alone), "alone", overwrite=True).state for p in (packed, now_apart)
    ]
    assert all(state is not None for state in [*states, *other])
    assert other[0].history[0] != other[1].history[0]  # type: ignore[union-attr]


def test_batches_name_documents_only_where_rows_hold_several(tiny_corpus: Params) -> None:
    corpus = CorpusSplit(tiny_corpus.paths.corpus, "train")
    whole = corpus_shard(corpus, 0, len(corpus))
    several = [len(np.unique(row[row != PADDING])) > 1 for row in whole.rows.doc_ids]
    assert {True, False} == set(several)
    for attention in ("documents", "packed"):
        teacher = NoTeacher(corpus, shard_rows=len(corpus), attention=attention)  # type: ignore[arg-type]
        for row, mixed in enumerate(several):
            batch = make_batch(teacher, [(whole, row)])
            assert (batch.doc_ids is not None) == (mixed and attention == "documents")
        batch = make_batch(teacher, [(whole, row) for row in range(len(corpus))])
        if attention == "documents":
            assert np.array_equal(batch.doc_ids, whole.rows.doc_ids)  # type: ignore[arg-type]


def test_no_teacher_needs_no_cache(tiny_corpus: Params) -> None:
    state = run_training(change(tiny_corpus, train={"teacher": "none"}), "plain").state
    assert state is not None
    assert "train/kl" not in state.history[-1]
    assert state.history[-1]["train/loss"] == pytest.approx(state.history[-1]["train/ce"])


def test_bad_steps_are_skipped_counted_and_fatal_in_the_end(
    tiny_cache: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer._losses
    calls = iter(range(10**6))

    def poisoned(student, batch, params, dtype):  # type: ignore[no-untyped-def]
        sums = original(student, batch, params, dtype)
        if torch.is_grad_enabled() and next(calls) in (2, 3):
            return trainer.LossSums(sums.total * float("nan"), sums.ce, sums.kl)
        return sums

    monkeypatch.setattr(trainer, "_losses", poisoned)
    state = run_training(tiny_cache, "poisoned").state
    assert state is not None
    assert state.skipped == 2
    for tensor in weights(tiny_cache.paths.runs / "poisoned").values():
        assert bool(torch.isfinite(tensor).all())
    calls = iter(range(10**6))
    with pytest.raises(DecantError, match=r"2 steps had .* train\.max_skipped_steps=1"):
        run_training(change(tiny_cache, train={"max_skipped_steps": 1}), "fatal")


def test_documents_ends_and_padding_are_out_of_the_loss(tiny_cache: Params) -> None:
    corpus = CorpusSplit(tiny_cache.paths.corpus, "train")
    last = len(corpus) - 1
    whole = corpus_shard(corpus, 0, len(corpus))
    batch = make_batch(
        NoTeacher(corpus, shard_rows=len(corpus), attention="documents"),
        [(whole, 0), (whole, 1), (whole, last)],
    )
    rows = [corpus.rows(row, row + 1) for row in (0, 1, last)]
    doc_ids = np.concatenate([row.doc_ids for row in rows])
    tokens = np.concatenate([row.tokens for row in rows])
    assert (doc_ids[-1] == PADDING).any()
    for r in range(3):
        for t in range(32):
            label = int(batch.labels[r, t])
            if t == 31 or doc_ids[r, t + 1] != doc_ids[r, t] or doc_ids[r, t] == PADDING:
                assert label == IGNORE
            else:
                assert label == tokens[r, t + 1]


def test_stream_sees_every_row_and_seeks(tiny_corpus: Params) -> None:
    corpus = CorpusSplit(tiny_corpus.paths.corpus, "train")
    teacher = NoTeacher(corpus, shard_rows=16, attention="packed")
    stream = BatchStream(teacher, batch_rows=5, window_shards=3, seed=7)
    counted = stream.starting_at(0)
    batches = [next(counted).tokens for _ in range(2 * len(corpus))]
    seen = [tuple(row.tolist()) for batch in batches for row in batch]
    whole = sorted(tuple(row.tolist()) for row in corpus.rows(0, len(corpus)).tokens)
    # Batches of 5 end with an epoch after every 5 epochs (each epoch alone: test_reader.py).
    for first in (0, 5 * len(corpus)):
        assert sorted(seen[first : first + 5 * len(corpus)]) == sorted(5 * whole)
    for number in (1, 9, 19, 57):
        assert torch.equal(next(stream.starting_at(number)).tokens, batches[number])


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_the_same_batches(ranks: int, tiny_cache: Params) -> None:
    teacher = CachedTeacher(open_cache(tiny_cache))
    options = {"batch_rows": 9, "window_shards": 2, "seed": 3}
    alone = BatchStream(teacher, **options).starting_at(4)
    together = [
        BatchStream(teacher, rank=rank, ranks=ranks, **options).starting_at(4)
        for rank in range(ranks)
    ]
    for _ in range(15):
        one, parts = next(alone), [next(stream) for stream in together]
        assert torch.equal(one.tokens, torch.cat([part.tokens for part in parts]))
        assert one.topk is not None
        ids = [part.topk.ids for part in parts if part.topk is not None]
        assert torch.equal(one.topk.ids, torch.cat(ids))


def test_shards_are_read_once_an_epoch_and_dropped(tiny_cache: Params) -> None:
    read: list[int] = []

    class Counting(CachedTeacher):
        def shard(self, number: int) -> Shard:
            read.append(number)
            return super().shard(number)

    teacher = Counting(open_cache(tiny_cache))
    stream = BatchStream(teacher, batch_rows=4, window_shards=2, seed=0)
    rows = len(teacher.corpus)
    batches = stream.starting_at(0)
    for _ in range(3 * rows // 4 - 16):  # up to where the look-ahead ends the third epoch
        next(batches)
    batches.close()
    counts = Counter(read)
    assert set(counts) == set(range(6))
    assert max(counts.values()) <= 4
    assert sum(counts.values()) <= 3 * 6 + 2


def test_another_run_in_its_place_is_refused_by_name(tiny_cache: Params) -> None:
    run_training(tiny_cache, "student")
    warmer = change(tiny_cache, train={"temperature": 2.0})
    with pytest.raises(MismatchError, match=r"train\.temperature=1\.0, now 2\.0.*--overwrite"):
        run_training(warmer, "student")
    assert run_training(warmer, "student", overwrite=True).state is not None


def test_a_run_is_not_continued_from_another_cache(tiny_cache: Params) -> None:
    run_training(tiny_cache, "student")
    open_folder(tiny_cache.paths.logits).remove()
    other = change(tiny_cache, prepare={"k": 4})
    capture_all(other)
    with pytest.raises(MismatchError, match=r"cache\.k=16, now 4"):
        run_training(other, "student")


def test_cache_of_another_teacher_is_refused(tiny_cache: Params, tmp_path: Path) -> None:
    make_teacher(tmp_path / "other", seed=3)
    with pytest.raises(MismatchError, match="was captured from teacher"):
        run_training(change(tiny_cache, paths={"teacher": str(tmp_path / "other")}), "student")


def test_temperature_not_stored_is_refused(tiny_cache: Params) -> None:
    with pytest.raises(MismatchError, match=r"temperature=3 is not among the stored .*1, 2, 4"):
        run_training(change(tiny_cache, train={"temperature": 3.0}), "student")


def test_low_retained_mass_is_warned_about(
    tiny_cache: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"temperature": 4.0, "min_retained_mass": 0.9, "steps": 1}
    run_training(change(tiny_cache, train=train), "student")
    assert "warning: at temperature 4 the kept ids hold" in capsys.readouterr().out


@pytest.mark.parametrize(("k", "draws"), [(8, 8), (0, 30)])
def test_training_on_draws(
    k: int, draws: int, tiny_corpus: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cached and online teachers draw the same ids, so they train the same."""
    params = change(tiny_corpus, prepare={"k": k, "draws": draws}, train={"steps": 4})
    capture_all(params)
    cached = run_training(params, "cached").state
    online = run_training(change(params, train={"teacher": "online"}), "online").state
    assert cached is not None
    assert online is not None
    for one, two in zip(cached.history, online.history, strict=True):
        for name in ("validation/loss", "validation/kl"):
            if name in one:
                assert one[name] == pytest.approx(two[name], abs=5e-3)
    assert "warning" not in capsys.readouterr().out
    run_training(change(params, train={"temperature": 2.0, "steps": 1}), "warm")
    assert "draws were taken at temperature 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 299}, "299 vocabulary rows, the corpus uses a tokenizer of 300 ids"),
        ({"max_seq_len": 16}, r"max_seq_len=16 is less than the corpus's row length 32"),
        ({"num_heads": 5}, "hidden_size=32 must be divisible by num_heads=5"),
        ({"init": "checkpoint"}, r"needs student\.checkpoint"),
        ({"init": "layers", "layers": [9]}, r"student\.layers=\[9\] must name different layers"),
    ],
)
def test_students_that_cannot_be_are_refused(
    changes: dict[str, object], message: str, tiny_cache: Params
) -> None:
    student = {"init": "random"} | SMALL | changes
    with pytest.raises(ParamsError, match=message):
        run_training(change(tiny_cache, student=student), "student")


def test_student_with_more_rows_than_the_teacher_learns(tiny_cache: Params) -> None:
    """Shared ids: tokenizer 300, teacher 320 rows, student 340 rows."""
    student = {"init": "random"} | SMALL | {"vocab_size": 340}
    state = run_training(change(tiny_cache, student=student), "wide").state
    assert state is not None
    assert state.history[-1]["validation/loss"] < state.history[0]["validation/loss"]


def test_student_from_a_checkpoint_starts_where_it_ended(tiny_cache: Params) -> None:
    first = run_training(tiny_cache, "first")
    student = {"init": "checkpoint", "checkpoint": str(first.folder / "model")}
    second = run_training(change(tiny_cache, student=student), "second").state
    assert first.state is not None
    assert second is not None
    assert second.history[0]["validation/loss"] == pytest.approx(
        first.state.history[-1]["validation/loss"], abs=1e-5
    )


def test_learning_rate_rises_then_falls(tiny_params: Params) -> None:
    params: TrainParams = tiny_params.train.model_copy(
        update={"steps": 100, "warmup_steps": 10, "learning_rate": 1.0, "min_learning_rate": 0.1}
    )
    rates = [learning_rate(step, params) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[99] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[10 + 89 // 2] == pytest.approx(0.55, abs=0.01)


def test_norms_and_biases_are_not_decayed(tiny_params: Params) -> None:
    student = build_student(tiny_params.student, tiny_params.paths.teacher)
    groups = build_optimizer(student, tiny_params.train).param_groups
    assert groups[0]["weight_decay"] == tiny_params.train.weight_decay
    assert groups[1]["weight_decay"] == 0.0
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"])
    counted = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert counted == student.count_parameters()
