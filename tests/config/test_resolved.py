"""Epochs as steps, `auto` rows as a number: computed once, before anything reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.params import Params, load_params
from pipeline.config.resolved import resolve
from pipeline.errors import ParamsError
from tests.helpers import ROOT, change


def epochs(params: Params, count: float, **train: object) -> Params:
    return change(params, train={"steps": None, "epochs": count, **train})


@pytest.mark.parametrize(
    ("count", "batch_rows", "gradient_accumulation_steps", "steps"),
    [
        (1, 10, 1, 10),
        (3, 10, 1, 30),
        (3, 8, 1, 38),
        (3, 4, 2, 38),
        (0.25, 10, 1, 3),
        (0.001, 4, 1, 1),
    ],
)
def test_epochs_come_to_steps(
    count: float, batch_rows: int, gradient_accumulation_steps: int, steps: int, tiny_params: Params
) -> None:
    """Worked by hand for 100 rows."""
    shape = {"batch_rows": batch_rows, "gradient_accumulation_steps": gradient_accumulation_steps}
    resolved = resolve(epochs(tiny_params, count, **shape), train_rows=100, num_ids=300)
    assert (resolved.train.num_steps, resolved.train.epochs) == (steps, None)
    assert resolve(resolved, train_rows=100, num_ids=300) == resolved


def test_steps_are_left_alone(tiny_params: Params) -> None:
    assert resolve(tiny_params, train_rows=1, num_ids=300).train == tiny_params.train


@pytest.mark.parametrize("given", ["train.steps=null", "train.epochs=2"])
def test_one_of_the_two_says_how_long(given: str) -> None:
    with pytest.raises(ParamsError, match=r"steps=\w+ and epochs=.* set one of the two, and the"):
        load_params(ROOT / "params.yaml", [given])
    both = ["train.steps=null", "train.epochs=2"]
    assert load_params(ROOT / "params.yaml", both).train.epochs == 2


def test_a_schedule_that_does_not_fit_the_epochs_is_refused(tiny_params: Params) -> None:
    wsd = {"schedule": "wsd", "warmup_steps": 9, "decay_fraction": 0.2, "batch_rows": 10}
    params = epochs(tiny_params, 1, **wsd)
    with pytest.raises(ParamsError, match=r"train\.epochs=1 over 100 rows .*steps=10, 2, overlap"):
        resolve(params, train_rows=100, num_ids=300)
    assert resolve(params, train_rows=200, num_ids=300).train.num_steps == 20


@pytest.mark.parametrize(
    ("ids", "rows"), [(300, 320), (320, 320), (49_152, 49_152), (151_665, 151_680)]
)
def test_auto_rows_are_the_ids_in_whole_tiles(ids: int, rows: int, tiny_params: Params) -> None:
    assert tiny_params.student.vocab_size == "auto"  # the default of the project
    assert resolve(tiny_params, train_rows=1, num_ids=ids).student.vocab_size == rows


def test_a_number_of_rows_is_taken_at_its_word(tiny_params: Params) -> None:
    params = change(tiny_params, student={"vocab_size": 1000})
    assert resolve(params, train_rows=1, num_ids=300).student.vocab_size == 1000


def test_auto_heads_divide_the_width(tiny_params: Params) -> None:
    assert tiny_params.student.head_dim == "auto"  # the default of the project
    params = change(tiny_params, student={"hidden_size": 96, "num_heads": 6})
    assert resolve(params, train_rows=1, num_ids=300).student.head_dim == 16
    wide = change(params, student={"head_dim": 64})
    assert resolve(wide, train_rows=1, num_ids=300).student.head_dim == 64


def test_auto_heads_of_no_whole_width_are_refused(tiny_params: Params) -> None:
    params = change(tiny_params, student={"init": "random", "hidden_size": 96, "num_heads": 7})
    with pytest.raises(ParamsError, match=r"hidden_size=96 is not divisible by .*num_heads=7"):
        resolve(params, train_rows=1, num_ids=300)


@pytest.mark.parametrize("value", ["many", "0", "1.5", "true"])
def test_what_is_no_number_of_rows_is_refused(value: str) -> None:
    with pytest.raises(ParamsError, match=r"student\.vocab_size=.* must be auto or a whole number"):
        load_params(Path(ROOT / "params.yaml"), [f"student.vocab_size={value}"])
