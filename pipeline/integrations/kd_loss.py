"""The loss of a batch from a cache, for any training loop: cross-entropy and a sparse divergence.

    logits = model(**model_inputs(batch)).logits
    loss = sparse_kd_loss(logits, batch, alpha=0.5, temperature=1.0)

This is the objective of `stages/train.py`, alpha tau^2 D + (1 - alpha) CE (Hinton et al. 2015),
with D as the mean over the positions that have a target and CE as the mean over all labels. Given
hidden states and the head's matrix in place of logits, it never holds tokens x vocabulary.

Shapes: B batch, L row length, H hidden, V vocabulary rows of the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.train_params import Divergence
from pipeline.data.packing import IGNORE
from pipeline.errors import MismatchError, ParamsError
from pipeline.integrations.cache_dataset import Row, topk_of
from pipeline.losses.chunked import LossSums, distillation_loss_sums, logits_loss_sums
from pipeline.model.logit_transform import UNCHANGED, LogitTransform
from pipeline.runtime.transfer import to_device


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised; the same values mean the same in `train.*` of params.yaml."""

    alpha: float = 0.5
    """Weight of the divergence; cross-entropy has weight 1 - alpha."""
    temperature: float = 1.0
    """Temperature of teacher and student in the divergence: 1, or one that the cache stores."""
    divergence: Divergence = "forward_kl"
    """One of `train.divergence`."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ParamsError(f"alpha={self.alpha} is outside 0..1: it is the divergence's weight")


@dataclass(frozen=True)
class Counts:
    """The positions over which a loss is a mean."""

    labels: float
    targets: float

    @staticmethod
    def of(batch: Row) -> Counts:
        """Count the positions of a batch with a label, and those that have a target as well."""
        in_loss = batch["labels"][:, 1:] != IGNORE
        both = in_loss & batch["teacher_has_target"][:, :-1]
        labels, targets = torch.stack((in_loss.sum(), both.sum())).tolist()
        return Counts(labels, targets)


def sparse_kd_loss(
    outputs: Tensor,
    batch: Row,
    *,
    head: Tensor | None = None,
    transform: LogitTransform = UNCHANGED,
    alpha: float = 0.5,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    chunk: int = 256,
) -> Tensor:
    """Return the mean loss of a batch, float32 scalar with gradient.

    Args:
        outputs: the student's logits [B, L, V]; with `head`, its final hidden states [B, L, H].
        batch: from `collate`, on any device.
        head: the matrix [V, H] whose product with the hidden states gives the logits.
        transform: what the student does to its logits after that product; a model of transformers
            has `LogitTransform.of_config(model.config)`. Ignored without `head`.
        alpha, temperature, divergence: see `Objective`.
        chunk: positions whose float32 logits are in memory at once.

    Raises:
        MismatchError: the temperature is not stored, sampled ids cannot express the divergence, or
            `outputs` are those of another batch.
        ParamsError: alpha is outside 0..1.
    """
    objective = Objective(alpha=alpha, temperature=temperature, divergence=divergence)
    counts = Counts.of(batch)
    sums = kd_loss_sums(outputs, batch, objective, counts, head, transform, chunk)
    return sums.total / max(1.0, counts.labels)


def kd_loss_sums(
    outputs: Tensor,
    batch: Row,
    objective: Objective,
    counts: Counts,
    head: Tensor | None = None,
    transform: LogitTransform = UNCHANGED,
    chunk: int = 256,
) -> LossSums:
    """Return the sums of a batch's loss, to be divided by `counts.labels`.

    Args:
        counts: of all batches of an optimizer step, over which the loss is a mean.
        outputs, batch, head, transform, chunk: as in `sparse_kd_loss`.
    """
    shape = batch["input_ids"].shape
    if outputs.shape[:2] != shape:
        raise MismatchError(
            f"the outputs have positions {tuple(outputs.shape[:2])}, and the batch {tuple(shape)}: "
            "pass those of model(**model_inputs(batch))"
        )
    device = outputs.device
    vocab_size = outputs.shape[-1] if head is None else len(head)
    ids = batch["teacher_ids"]
    if not ids.is_cuda and ids.numel() and int(ids.max()) >= vocab_size:
        raise MismatchError(
            f"the teacher's id {int(ids.max())} is beyond the student's {vocab_size} vocabulary "
            "rows: choose a student that shares the teacher's ids"
        )
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
    in_loss = (labels != IGNORE).nonzero()[:, 0]
    index = to_device(in_loss, device) if len(in_loss) < len(labels) else None

    def chosen(tensor: Tensor) -> Tensor:
        """Move [B, L, ...] to the outputs' device, and take the positions in the loss."""
        flat = to_device(tensor, device).flatten(0, 1)
        return flat if index is None else flat.index_select(0, index)

    topk = topk_of(batch, vocab_size).map(chosen)
    labels = chosen(labels.view(shape))
    options: dict[str, Any] = {
        "alpha": objective.alpha,
        "temperature": objective.temperature,
        "divergence": objective.divergence,
        "target_weight": max(1.0, counts.labels) / max(1.0, counts.targets),
        "chunk": chunk,
    }
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else outputs.dtype
    with torch.autocast(device.type, enabled=False):
        if head is None:
            return logits_loss_sums(chosen(outputs), labels, topk, **options)
        return distillation_loss_sums(
            chosen(outputs), head, labels, topk, transform=transform, dtype=dtype, **options
        )
