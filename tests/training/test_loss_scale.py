"""Training in float16: the scale follows GradScaler's rule, overflow costs a step and no more."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.params import Params
from pipeline.errors import DecantError
from pipeline.training import loss_scale, trainer
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.distillation import DistillationLoss
from pipeline.training.loss_scale import LossScale
from pipeline.training.run import run_training
from tests.helpers import (
    LORA,
    SMALL,
    change,
    from_folder,
    losses,
    run_with_power_cut,
    weights,
)
from tests.models import make_mistral
from tests.training.ranks import run_ranks


def in_float16(params: Params, **sections: dict[str, Any]) -> Params:
    params = change(params, train={"dtype": "float16"})
    return change(params, **sections)


def spoil(patch: pytest.MonkeyPatch, change_loss: Callable[[Tensor], Tensor], *steps: int) -> None:
    """Apply `change_loss` to the loss of these steps, from 0."""
    original, taken = DistillationLoss.forward, iter(range(10**6))

    def forward(self: DistillationLoss, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        total, *rest = original(self, *args, **options)
        if torch.is_grad_enabled() and next(taken) in steps:
            total = change_loss(total)
        return (total, *rest)

    patch.setattr(DistillationLoss, "forward", forward)


def overflow(total: Tensor) -> Tensor:
    """Leave the loss as it is and make its gradient infinite."""
    total.register_hook(lambda grad: grad * float("inf"))
    return total


def test_the_scale_is_that_of_gradscaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step over overflows at random, with a shorter interval of growth."""
    theirs = torch.amp.GradScaler("cpu")
    assert LossScale().value == theirs._init_scale
    assert theirs.get_growth_interval() == loss_scale._GROWTH_INTERVAL
    theirs.set_growth_interval(3)
    monkeypatch.setattr(loss_scale, "_GROWTH_INTERVAL", 3)
    ours, weight = LossScale(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    overflows = (torch.rand(200) < 0.2).tolist()
    for overflowed in overflows:
        theirs.scale((weight * 1.0).sum()).backward()
        if overflowed:
            weight.grad = torch.full((1,), torch.inf)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(overflowed=overflowed)
        assert ours.value == theirs.get_scale()
    assert ours.overflowed == sum(overflows)
    assert ours.value not in (2.0**16, loss_scale._MINIMUM)


def test_a_step_that_overflows_is_skipped_and_halves_the_scale(
    tiny_cache: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, overflow, 2)
    original, unchanged = trainer._step_or_skip, []

    def watched(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        original(optimizer, *args)
        unchanged.append(all(map(torch.equal, before, parameters)))

    monkeypatch.setattr(trainer, "_step_or_skip", watched)
    params = in_float16(tiny_cache, run={"max_skipped_steps": 0})  # it does not count
    state = run_training(params, "student").state
    assert state is not None
    assert state.loss_scale is not None
    assert unchanged == [step == 2 for step in range(8)]
    scales = [point["train/loss_scale"] for point in state.history if "train/loss" in point]
    assert scales == [65536.0] * 3 + [32768.0] * 5
    assert (state.skipped, state.loss_scale.overflowed) == (0, 1)
    assert state.history[-1]["train/overflowed_steps"] == 1.0
    assert state.history[-1]["train/skipped_steps"] == 0.0


def test_a_loss_that_is_not_finite_is_no_overflow(
    tiny_cache: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda total: total * float("nan"), 2, 3)
    state = run_training(in_float16(tiny_cache), "student").state
    assert state is not None
    assert state.loss_scale == LossScale(steps_without_overflow=6)
    assert state.skipped == 2
    spoil(monkeypatch, lambda total: total * float("nan"), 2, 3)
    with pytest.raises(DecantError, match=r"max_skipped_steps=1: .* set train\.dtype=float32"):
        run_training(in_float16(tiny_cache, run={"max_skipped_steps": 1}), "fatal")


def test_gradients_that_always_overflow_end_the_run(
    tiny_cache: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, overflow, *range(100))
    monkeypatch.setattr(trainer, "LossScale", partial(LossScale, value=8.0))
    with pytest.raises(DecantError, match=r"loss scale of 1, after 4 skipped steps: set train\.d"):
        run_training(in_float16(tiny_cache), "student")


def test_an_interrupted_run_continues_with_its_scale(
    tiny_cache: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = in_float16(tiny_cache, student={"init": "random", "dropout": 0.1} | SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "LossScale", partial(LossScale, value=2.0**24))
        spoil(patch, overflow, 1, 3)
        run_training(params, "whole")
        spoil(patch, overflow, 1, 3)
        run_with_power_cut(params, "broken", before_step=5)
    assert Checkpoints(params.paths.runs / "broken" / "checkpoints").names()[-1].endswith("4")
    run_training(params, "broken")
    whole, broken = (params.paths.runs / name for name in ("whole", "broken"))
    first, second = losses(whole), losses(broken)
    for curves in (first, second):
        curves.pop("train/gradient_norm")  # nan where gradients overflowed
    assert first == second
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(broken)[name]), name
    assert second["train/loss_scale"][1][-1] <= 2.0**22


def test_other_formats_have_no_scale(tiny_cache: Params) -> None:
    state = run_training(tiny_cache, "student").state
    assert state is not None
    assert state.loss_scale is None
    assert not any("scale" in name or "overflow" in name for name in state.history[-1])


@pytest.mark.parametrize(
    ("train", "student", "run"),
    [
        ({"batch_rows": 2, "gradient_accumulation_steps": 2}, {}, {}),
        ({"temperature": 2.0}, {}, {"activation_checkpointing": True}),
        ({"divergence": "reverse_kl"}, {"lora": LORA}, {}),
    ],
)
def test_it_trains_as_float32_does(
    train: dict[str, Any], student: dict[str, Any], run: dict[str, Any], tiny_cache: Params
) -> None:
    """Losses within 0.1 %; validation too, which runs in the same format."""
    params = change(tiny_cache, train=train, student=student, run=run)
    single, half = (
        run_training(change(params, train={"dtype": dtype}), dtype).state
        for dtype in ("float32", "float16")
    )
    assert single is not None
    assert half is not None
    assert half.loss_scale == LossScale(steps_without_overflow=8)
    for one, two in zip(single.history, half.history, strict=True):
        for name in one.keys() & {"train/loss", "train/divergence", "validation/loss"}:
            assert two[name] == pytest.approx(one[name], rel=1e-3), name
    assert single.history[-1]["train/loss"] != half.history[-1]["train/loss"]


def test_a_student_of_transformers_trains_in_float16(tiny_cache: Params) -> None:
    params = from_folder(tiny_cache, make_mistral(tiny_cache.paths.runs.parent / "mistral"))
    params = change(params, train={"steps": 2, "eval_every": 2})
    single, half = (
        run_training(change(params, train={"dtype": dtype}), dtype).state
        for dtype in ("float32", "float16")
    )
    assert single is not None
    assert half is not None
    for one, two in zip(single.history, half.history, strict=True):
        for name in one.keys() & {"train/loss", "validation/loss"}:
            assert two[name] == pytest.approx(one[name], rel=1e-3), name


def overflow_on_one(params: Params, name: str) -> None:
    if os.environ["RANK"] == "1":
        spoil(pytest.MonkeyPatch(), overflow, 2)
    run_training(params, name)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_skip_the_same_steps_and_end_like_one(
    parallel: str,
    forkserver: ForkServerContext,
    tiny_cache: Params,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients overflow on one rank only, which both learn from their common norm."""
    params = in_float16(tiny_cache, train={"steps": 5}, run={"parallel": parallel})
    run_ranks(forkserver, 2, overflow_on_one, params, "two")
    spoil(monkeypatch, overflow, 2)
    run_training(params, "one")
    one, two = params.paths.runs / "one", params.paths.runs / "two"
    first, second = losses(one), losses(two)
    assert second["train/overflowed_steps"][1] == [0.0, 0.0, 1.0, 1.0, 1.0]
    for name in ("train/loss_scale", "train/overflowed_steps", "train/skipped_steps"):
        assert first[name] == second[name]
    for name in ("train/loss", "validation/loss"):
        assert first[name][1] == pytest.approx(second[name][1], rel=1e-3), name
    for name, tensor in weights(one).items():
        assert (tensor - weights(two)[name]).norm() < 0.01 * tensor.norm(), name
