"""Measurements on held-out rows, before and during training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.config.train_params import TrainParams
from pipeline.errors import DecantError
from pipeline.runtime.ranks import Ranks
from pipeline.target_sources.target_source import TargetSource
from pipeline.training.batches import Batch, first_rows
from pipeline.training.distributed import evaluating


@dataclass(frozen=True)
class Validation:
    """The rows to validate on, with their targets for KL."""

    source: TargetSource
    rows: int  # number of rows to validate on, from the first


def validate(
    model: nn.Module, validation: Validation, params: TrainParams, ranks: Ranks
) -> dict[str, float]:
    """Return mean cross-entropy, its perplexity and, with targets, tail-bucket KL.

    Values are in nats per token, at temperature 1; perplexity is exp of the cross-entropy, capped
    at exp(700), and the KL is the mean over the positions with a target. They do not depend on the
    training objective, so runs can be compared. Each rank takes its share of each batch; the result
    is the same on all ranks.

    Args:
        model: a DistillationLoss, as `parallelise` returns it.

    Raises:
        DecantError: the loss is not finite, which no later step can undo, or no position is in it.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # of CE and KL
    num_labels = num_targets = 0
    with evaluating(model):
        for batch in first_rows(
            validation.source,
            validation.rows,
            params.batch_rows,
            rank=ranks.rank,
            world_size=ranks.world_size,
        ):
            _, batch_ce, batch_kl = model(
                batch, alpha=params.alpha, temperature=1.0, divergence="forward_kl"
            )
            sums += torch.stack((batch_ce, batch_kl))
            num_labels += batch.num_labels
            num_targets += batch.num_targets
    ce, kl, labels, targets = ranks.sum(*sums.tolist(), num_labels, num_targets)
    if not labels:
        raise DecantError("the validation rows hold no position in the loss: enlarge the corpus")
    if not math.isfinite(ce):
        raise DecantError(
            f"the validation loss is {ce}, since weights or what they compute have overflowed: "
            "lower train.learning_rate, or start from a model with finite weights"
        )
    loss = ce / labels
    values = {"validation/loss": loss, "validation/perplexity": math.exp(min(loss, 700.0))}
    return values | ({"validation/kl": kl / targets} if targets else {})


def retained_mass(batch: Batch, temperature: float) -> float:
    """Return the mean probability of the kept ids at `temperature`; NaN without a target."""
    assert batch.topk is not None
    topk = batch.topk[batch.topk.has_target]
    if topk.num_sampled:  # sampled ids represent the rest of the mass
        return 1.0
    _, tail = topk.target(temperature)
    return 1.0 - float(tail.mean())
