"""Student and loss as one module, which the parallel engines wrap and the trainer calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config.train_params import Divergence
from pipeline.data.packing import IGNORE
from pipeline.losses.chunked import distillation_loss_sums
from pipeline.model.student import Student
from pipeline.training.batches import Batch


class DistillationLoss(nn.Module):
    """The loss sums of a batch: alpha tau^2 D + (1 - alpha) CE over unmasked positions.

    The loss reads the head's weight directly, outside any layer. Because this happens in this
    module's forward, FSDP2 has gathered the weight as a plain tensor by then, and its gradient
    (added to the embedding's if the head is tied) goes through the engines' hooks.

    Args:
        student: a student with float32 parameters.
        dtype: dtype of autocast and of the factors of the head's product; losses are float32.
        head_chunk: number of positions whose logits are in memory at once.
    """

    def __init__(self, student: Student, *, dtype: torch.dtype, head_chunk: int) -> None:
        super().__init__()
        self.student = student
        self.dtype = dtype
        self.head_chunk = head_chunk

    def forward(
        self, batch: Batch, *, alpha: float, temperature: float, divergence: Divergence
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of total (with gradient), CE and D as float32 scalars.

        All are 0 if no position has a label. The result is a tuple because FSDP2 looks for tensors
        that need gradients in tuples, not in dataclasses.
        """
        device = self.student.head_weight.device
        labels = batch.labels.to(device, non_blocking=True)
        wanted = labels != IGNORE
        doc_ids = batch.doc_ids
        if doc_ids is not None:
            doc_ids = doc_ids.to(device, non_blocking=True)
        # No weight is used twice in a forward, so autocast's cache would only hold copies longer.
        with torch.autocast(
            device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        ):
            hidden = self.student.hidden_states(batch.tokens.to(device, non_blocking=True), doc_ids)
        topk = None
        if batch.topk is not None:
            topk = batch.topk.map(lambda t: t.to(device, non_blocking=True))[wanted]
        sums = distillation_loss_sums(
            hidden[wanted],
            self.student.head_weight,
            labels[wanted],
            topk,
            alpha=alpha,
            temperature=temperature,
            divergence=divergence,
            transform=self.student.logit_transform,
            dtype=self.dtype,
            chunk=self.head_chunk,
        )
        return sums.total, sums.ce, sums.divergence
