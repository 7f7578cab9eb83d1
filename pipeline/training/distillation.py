"""Student and loss as one module, which the parallel engines wrap and the trainer calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config.train_params import Divergence
from pipeline.losses.chunked import distillation_loss_sums
from pipeline.model.student import Student
from pipeline.runtime.transfer import to_device
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
        self,
        batch: Batch,
        *,
        alpha: float,
        temperature: float,
        divergence: Divergence,
        target_weight: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of total (with gradient), CE and D as float32 scalars.

        `target_weight` multiplies D in the total: positions in the loss per position with a target.
        All are 0 if no position has a label. The result is a tuple because FSDP2 looks for tensors
        that need gradients in tuples, not in dataclasses.
        """
        device = self.student.head_weight.device
        # No weight is used twice in a forward, so autocast's cache would only hold copies longer.
        with torch.autocast(
            device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        ):
            hidden = self.student.hidden_states(to_device(batch.tokens, device), batch.doc_ids)
        in_loss = batch.in_loss  # found on the CPU, since a GPU would have to be waited for
        index = to_device(in_loss, device) if len(in_loss) < batch.labels.numel() else None

        def chosen(tensor: Tensor) -> Tensor:
            """Move [B, L, ...] to the student's device, and take the positions in the loss."""
            flat = to_device(tensor, device).flatten(0, 1)
            return flat if index is None else flat.index_select(0, index)

        sums = distillation_loss_sums(
            chosen(hidden),
            self.student.head_weight,
            chosen(batch.labels),
            batch.topk.map(chosen) if batch.topk is not None else None,
            alpha=alpha,
            temperature=temperature,
            divergence=divergence,
            target_weight=target_weight,
            transform=self.student.logit_transform,
            dtype=self.dtype,
            chunk=self.head_chunk,
        )
        return sums.total, sums.ce, sums.divergence
