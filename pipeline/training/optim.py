"""AdamW with decoupled decay on matrices only, and what changes from step to step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.config import TrainParams


def build_optimizer(student: nn.Module, params: TrainParams) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) of what is trained; norms and biases are not decayed."""
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": params.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=params.learning_rate, betas=params.betas, fused=True)


def learning_rate(step: int, params: TrainParams) -> float:
    """Learning rate of optimizer step `step` (from 0).

    Rises linearly to `learning_rate` over `warmup_steps` and ends at `min_learning_rate` at the
    last step. Between the two, of the difference there is left, x in [0, 1] being the part of the
    decay that is done,

    cosine: (1 + cos(pi x)) / 2, decaying from the end of warm-up on (Loshchilov & Hutter 2017,
    eq. 5, without restarts).
    wsd: 1 - x or 1 - sqrt(x), decaying over the last `decay_share` of the steps, constant before
    (warm-up, stable, decay: Hu et al. 2024, MiniCPM; 1 - sqrt: Haegele et al. 2024).
    """
    if step < params.warmup_steps:
        return params.learning_rate * (step + 1) / params.warmup_steps
    cosine = params.schedule == "cosine"
    last = params.steps - 1
    decay = last - params.warmup_steps if cosine else round(params.decay_share * params.steps)
    decay = max(1, decay)
    done = min(1.0, max(0.0, (step - last + decay) / decay))
    if cosine:
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        left = 1.0 - (done if params.decay_shape == "linear" else math.sqrt(done))
    low, high = params.min_learning_rate, params.learning_rate
    return low + (high - low) * left


def alpha_at(step: int, params: TrainParams) -> float:
    """Weight of KL at a step (from 0): from `alpha`, linearly, to `alpha_end` at the last one."""
    if params.alpha_end is None:
        return params.alpha
    return params.alpha + (params.alpha_end - params.alpha) * step / max(1, params.steps - 1)


class WeightAverage:
    """Exponential moving average of what is trained; of nothing where `decay` is None.

    After step t (from 0), average += (1 - d) (weight - average) with d = min(decay,
    (1 + t) / (10 + t)), so that a short run's average forgets where it started (the warm-up of
    TensorFlow's ExponentialMovingAverage).

    Attributes:
        tensors: the average by parameter name, float32, sharded as the parameters are.
    """

    def __init__(self, student: nn.Module, decay: float | None) -> None:
        named = student.named_parameters() if decay is not None else iter(())
        trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._decay = decay or 0.0
        self._weights = [parameter.detach() for parameter in trained.values()]
        self.tensors: dict[str, Tensor] = {n: p.detach().clone() for n, p in trained.items()}

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for average, weight in zip(self.tensors.values(), self._weights, strict=True):
            average.lerp_(weight, 1.0 - decay)

    def swap(self) -> None:
        """Exchange average and weights, in place, since engines hold on to the weights' memory."""
        for average, weight in zip(self.tensors.values(), self._weights, strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average as the student's weights, for as long as the block runs."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
