"""AdamW that decays matrices only, and the values that change from step to step.

There is no moving average of the weights: over 32 steps of the demo, with decay 0.9 after warm-up,
the average reached a validation loss of 3.406 and the weights themselves reached 3.389.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.config.train_params import TrainParams


def build_optimizer(student: nn.Module, params: TrainParams) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019) for the trainable parameters.

    Norms and biases are not decayed.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": params.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=params.learning_rate, betas=params.betas, fused=True)


def learning_rate(step: int, params: TrainParams) -> float:
    """Return the learning rate of optimizer step `step` (from 0).

    The rate rises linearly to `learning_rate` over `warmup_steps` and reaches `min_learning_rate`
    at the last step; a run no longer than its warm-up ends within it. With x in [0, 1], the part
    of the decay that is done, the rate is `min_learning_rate` plus a share of the difference
    between the two rates:

    cosine: (1 + cos(pi x)) / 2, decaying from the end of warm-up (Loshchilov & Hutter 2017, eq. 5,
    without restarts).
    wsd: 1 - x or 1 - sqrt(x), decaying over the last `decay_fraction` of the steps and constant
    before (warm-up, stable, decay: Hu et al. 2024, MiniCPM; 1 - sqrt: Haegele et al. 2024).
    """
    if step < params.warmup_steps:
        return params.learning_rate * (step + 1) / params.warmup_steps
    cosine = params.schedule == "cosine"
    last = params.num_steps - 1
    decay = last - params.warmup_steps if cosine else round(params.decay_fraction * (last + 1))
    decay = max(1, decay)
    done = min(1.0, max(0.0, (step - last + decay) / decay))
    if cosine:
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        left = 1.0 - (done if params.decay_shape == "linear" else math.sqrt(done))
    low, high = params.min_learning_rate, params.learning_rate
    return low + (high - low) * left


def alpha_at(step: int, params: TrainParams) -> float:
    """Return KL's weight at a step (from 0), linear from `alpha` to `alpha_end` at the last."""
    if params.alpha_end is None:
        return params.alpha
    return params.alpha + (params.alpha_end - params.alpha) * step / max(1, params.num_steps - 1)
