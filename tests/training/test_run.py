"""A run: what it is made from, what is refused, what is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.params import Params
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.io.folders import open_folder
from pipeline.io.ownership import lock
from pipeline.model.named_models import model_folder
from pipeline.runtime.ranks import Ranks
from pipeline.training.run import _require_same_data, run_training
from tests.helpers import SMALL, capture_all, change, weights
from tests.models import make_teacher, make_tokenizer


def test_the_model_folder_is_complete_and_a_finished_run_is_left_alone(tiny_cache: Params) -> None:
    result = run_training(tiny_cache, "student")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {
        file.name for file in (result.folder / "model").iterdir()
    }
    assert not (result.folder / "checkpoints").exists()
    assert run_training(tiny_cache, "student").state is None


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


@pytest.mark.parametrize("teacher", ["online", "none"])
def test_another_tokenizer_than_the_corpuss_is_refused(
    teacher: str, tiny_corpus: Params, tmp_path: Path
) -> None:
    """A live teacher would read other words than the student; and the model would get its files."""
    other = make_teacher(tmp_path / "other")
    make_tokenizer(other, vocab_size=290)
    params = change(
        tiny_corpus,
        paths={"teacher": str(other)},
        student={"init": "random"} | SMALL,
        train={"targets": teacher},
    )
    with pytest.raises(MismatchError, match=r"was tokenized with tokenizer .*, .*other holds"):
        run_training(params, "student")


def test_a_students_own_tokenizer_goes_with_it_where_the_teachers_is_another(
    tiny_corpus: Params, tmp_path: Path
) -> None:
    start = make_teacher(tmp_path / "start")
    other = make_teacher(tmp_path / "other")
    make_tokenizer(other, vocab_size=290)
    params = change(
        tiny_corpus,
        paths={"teacher": str(other)},
        student={"init": "checkpoint", "checkpoint": str(start)},
        train={"targets": "none", "steps": 1},
    )
    model = run_training(params, "student").folder / "model"
    assert (model / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    with pytest.raises(MismatchError, match="was tokenized with"):
        run_training(change(params, train={"targets": "online"}), "online")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/"])
def test_a_run_is_one_folder(name: str, tiny_params: Params) -> None:
    """A script's empty variable must not make --overwrite delete all runs, or what is above."""
    with pytest.raises(ParamsError, match=r"--run '.*' is not the name of one folder in .*runs"):
        run_training(tiny_params, name, overwrite=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000])
def test_a_damaged_record_of_a_run_is_told_from_another_run(text: str, tiny_cache: Params) -> None:
    folder = run_training(tiny_cache, "student").folder
    (folder / "run.json").write_text(text)
    message = r"run\.json is missing or damaged.*restore a copy .*--overwrite.* --run"
    with pytest.raises(MismatchError, match=message):
        run_training(tiny_cache, "student")


def test_a_long_difference_is_shortened(tiny_cache: Params) -> None:
    folder = run_training(tiny_cache, "student").folder
    said = json.loads((folder / "run.json").read_text())
    said["student"]["layers"] = list(range(10_000))
    (folder / "run.json").write_text(json.dumps(said))
    with pytest.raises(MismatchError, match=r"student\.layers=.*, now \[0, 2\]") as caught:
        run_training(tiny_cache, "student")
    assert len(str(caught.value)) < 400


def test_a_damaged_model_is_refused_and_trained_again(
    tiny_cache: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run_training(tiny_cache, "student").folder / "model"
    whole = {name: tensor.clone() for name, tensor in weights(model.parent).items()}
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    runs = tiny_cache.paths.runs
    with pytest.raises(DecantError, match=r"model\.safetensors, .* --run student again"):
        model_folder(runs, "student")
    with pytest.raises(DecantError, match="does not match its checksum"):
        model_folder(runs, "student", model)
    assert run_training(tiny_cache, "student").state is not None
    assert "is damaged (model.safetensors" in capsys.readouterr().out
    again = weights(model_folder(runs, "student").parent)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_a_run_that_another_process_trains_is_refused(tiny_cache: Params) -> None:
    folder = tiny_cache.paths.runs / "student"
    with lock(folder, "wait"), pytest.raises(DecantError, match=r"written by process \d+ on "):
        run_training(tiny_cache, "student")
    assert run_training(tiny_cache, "student").state is not None


def test_temperature_not_stored_is_refused(tiny_cache: Params) -> None:
    with pytest.raises(MismatchError, match=r"temperature=3 is not among the stored .*1, 2, 4"):
        run_training(change(tiny_cache, train={"temperature": 3.0}), "student")


def test_low_retained_mass_is_warned_about(
    tiny_cache: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    params = change(
        tiny_cache, train={"temperature": 4.0, "steps": 1}, run={"min_retained_mass": 0.9}
    )
    run_training(params, "student")
    assert "warning: at temperature 4 the kept ids hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 299}, "299 vocabulary rows, the corpus uses a tokenizer of 300 ids"),
        ({"max_seq_len": 16}, r"max_seq_len=16 is less than the corpus's row length 32"),
        ({"num_heads": 5}, r"hidden_size=32 is not divisible by student\.num_heads=5"),
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


class RanksThatDiffer(Ranks):
    """This rank, and one that read a branch of the hub a moment later."""

    def gather(self, value: Any) -> list[Any]:
        return [value, {**value, "corpus_sha256": "0" * 64}]


def test_ranks_that_read_other_data_are_refused() -> None:
    identity = {"seed": 0, "corpus_sha256": "1" * 64}
    _require_same_data(identity, Ranks(torch.device("cpu")))
    with pytest.raises(MismatchError, match=r"read different corpora or caches: .* name a commit"):
        _require_same_data(identity, RanksThatDiffer(torch.device("cpu")))


def test_epochs_are_the_run_that_their_steps_are(tiny_cache: Params) -> None:
    """By 94 rows and 4 a step: 0.1 epochs are 3 steps."""
    some = change(tiny_cache, train={"steps": None, "epochs": 0.1})
    result = run_training(some, "student")
    assert result.state is not None
    assert result.state.step == 3
    again = change(tiny_cache, train={"steps": 3})
    assert run_training(again, "student").state is None  # finished already


def test_rows_of_a_random_student_follow_the_tokenizer(tiny_cache: Params) -> None:
    student = {"init": "random"} | SMALL | {"vocab_size": "auto"}
    result = run_training(change(tiny_cache, student=student, train={"steps": 1}), "student")
    config = json.loads((result.folder / "model" / "config.json").read_text())
    assert config["vocab_size"] == 320  # of 300 ids
    said = json.loads((result.folder / "run.json").read_text())
    assert said["student"]["vocab_size"] == 320
