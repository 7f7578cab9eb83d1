"""AdamW with decoupled decay on matrices only, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.config import TrainParams


def build_optimizer(student: nn.Module, params: TrainParams) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) of what is trained; norms and biases are not decayed."""
    trained = [p for p in student.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": params.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=params.learning_rate, betas=params.betas, fused=True)


def learning_rate(step: int, params: TrainParams) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then cosine.

    Rises to `learning_rate` over `warmup_steps`, then falls along half a cosine to
    `min_learning_rate` at the last step (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    if step < params.warmup_steps:
        return params.learning_rate * (step + 1) / params.warmup_steps
    span = max(1, params.steps - 1 - params.warmup_steps)
    share = min(1.0, (step - params.warmup_steps) / span)
    low, high = params.min_learning_rate, params.learning_rate
    return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * share))
