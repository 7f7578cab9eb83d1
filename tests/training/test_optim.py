"""Schedules by hand numbers; what is decayed."""

from __future__ import annotations

import itertools

import pytest

from pipeline.config.params import Params, load_params
from pipeline.config.train_params import TrainParams
from pipeline.errors import ParamsError
from pipeline.training.optim import alpha_at, build_optimizer, learning_rate
from pipeline.training.students import build_student
from tests.helpers import ROOT, change


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


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [5, 10, 10, 10, 10, 10, 7.75, 5.5, 3.25, 1]),
        ("one_minus_sqrt", [5, 10, 10, 10, 10, 10, 5.5, 3.636039, 2.205771, 1]),
    ],
)
def test_wsd_by_hand(shape: str, expected: list[float], tiny_params: Params) -> None:
    """10 steps, 2 of warm-up to 10, the last 4 of decay to 1: shares 1/4, 1/2, 3/4, 1 of it."""
    schedule = {"schedule": "wsd", "decay_fraction": 0.4, "decay_shape": shape}
    rate = {"steps": 10, "warmup_steps": 2, "learning_rate": 10.0, "min_learning_rate": 1.0}
    params = change(tiny_params, train=schedule | rate).train
    assert [learning_rate(step, params) for step in range(10)] == pytest.approx(expected)


def test_warm_up_and_decay_must_not_overlap() -> None:
    overrides = ["train.schedule=wsd", "train.steps=10", "train.warmup_steps=7"]
    with pytest.raises(ParamsError, match=r"warmup_steps=7 and decay_fraction=0\.4 of steps=10,"):
        load_params(ROOT / "params.yaml", [*overrides, "train.decay_fraction=0.4"])
    load_params(ROOT / "params.yaml", [*overrides, "train.decay_fraction=0.3"])


def test_alpha_moves_linearly(tiny_params: Params) -> None:
    params = change(tiny_params, train={"alpha": 0.9, "alpha_end": 0.1, "steps": 5}).train
    assert [alpha_at(step, params) for step in range(5)] == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    constant = change(tiny_params, train={"alpha": 0.9, "steps": 5}).train
    assert {alpha_at(step, constant) for step in range(5)} == {0.9}


def test_norms_and_biases_are_not_decayed(tiny_params: Params) -> None:
    student = build_student(tiny_params.student, tiny_params.paths.teacher)
    groups = build_optimizer(student, tiny_params.train).param_groups
    assert groups[0]["weight_decay"] == tiny_params.train.weight_decay
    assert groups[1]["weight_decay"] == 0.0
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"])
    counted = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert counted == student.count_parameters()
