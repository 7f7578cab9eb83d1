"""Student and loss as one module: what the parallel engines wrap and the trainer calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config import Divergence
from pipeline.data.packing import IGNORE
from pipeline.losses.chunked import distillation_loss_sums
from pipeline.model.base import Student
from pipeline.training.batches import Batch


class DistillationStep(nn.Module):
    """A batch to its loss sums: alpha tau^2 D + (1 - alpha) CE over unmasked positions.

    The loss reads the head's weight itself, outside any layer. Being in this module's forward, it
    does so while FSDP2 has the weight gathered, as a plain tensor, and the gradient that it returns
    for it (for a tied head: beside the embedding's) goes through the engines' hooks.

    Args:
        student: float32 parameters.
        dtype: of autocast and of the head's factors; losses are float32.
        head_chunk: positions whose logits are in memory at once.
    """

    def __init__(self, student: Student, *, dtype: torch.dtype, head_chunk: int) -> None:
        super().__init__()
        self.student = student
        self.dtype = dtype
        self.head_chunk = head_chunk

    def forward(
        self, batch: Batch, *, alpha: float, temperature: float, divergence: Divergence
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of total (with gradient), CE and D, float32 scalars; 0 where nothing is labelled.

        A tuple, since FSDP2 looks for tensors that take gradients in tuples, not in dataclasses.
        """
        device = self.student.head_weight.device
        labels = batch.labels.to(device, non_blocking=True)
        wanted = labels != IGNORE
        doc_ids = batch.doc_ids
        if doc_ids is not None:
            doc_ids = doc_ids.to(device, non_blocking=True)
        # No weight is used twice in a forward: autocast's cache would only hold on to its copies.
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
            dtype=self.dtype,
            chunk=self.head_chunk,
        )
        return sums.total, sums.ce, sums.divergence
