"""Running sums of what a language model is judged by, position by position.

Everything is accumulated in float64 over chunks of positions, so the result does not depend on the
chunk size. Shapes: n positions, V vocabulary rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One model on the validation rows."""

    loss: float  # cross-entropy of the next token, nats
    perplexity: float  # exp(loss)
    kl_to_teacher: float  # KL(teacher || model) over the whole vocabulary, nats
    top1_agreement: float  # share of positions with the teacher's most probable id
    accuracy: float  # share of positions whose most probable id is the next token
    calibration_error: float  # expected calibration error of the most probable id
    tokens: int  # positions judged


class ScoreSums:
    """Accumulates `Scores`, with the expected calibration error of Guo et al. 2017, eq. 3.

    ECE = sum_b (n_b / n) |accuracy_b - confidence_b| over equal-width bins of the confidence, which
    is the probability of the most probable id.
    """

    def __init__(self, bins: int) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # ce, kl, agreement, accuracy
        self._bins = torch.zeros(3, bins, dtype=torch.float64)  # count, confidence, correct
        self._count = 0

    def add(self, logits: Tensor, labels: Tensor, teacher_log_p: Tensor) -> None:
        """Judge n positions.

        Args:
            logits: float32 [n, V]. labels: int64 [n].
            teacher_log_p: float32 [n, V_teacher] with V_teacher <= V; further ids of the student
                carry no teacher mass.
        """
        log_q = logits.log_softmax(-1)
        ce = -log_q.gather(-1, labels[:, None]).sum()
        p = teacher_log_p.exp()
        kl = (p * (teacher_log_p - log_q[:, : p.shape[-1]])).sum()
        top_log_q, guess = log_q.max(-1)
        correct = guess == labels
        agree = (guess == teacher_log_p.max(-1).indices).sum()  # argmax takes 3.5 times as long
        self._sums += torch.stack(
            [ce.double(), kl.double(), agree.double(), correct.sum().double()]
        ).cpu()
        confidence = top_log_q.exp().double().cpu()
        bins = self._bins.shape[1]
        index = (confidence * bins).long().clamp_max(bins - 1)
        values = torch.stack([torch.ones_like(confidence), confidence, correct.double().cpu()])
        self._bins.index_add_(1, index, values)
        self._count += len(labels)

    def scores(self) -> Scores:
        """The means over all positions added."""
        ce, kl, agree, correct = (self._sums / self._count).tolist()
        _, confidence, right = self._bins
        return Scores(
            loss=ce,
            perplexity=math.exp(min(ce, 700.0)),
            kl_to_teacher=kl,
            top1_agreement=agree,
            accuracy=correct,
            calibration_error=float((right - confidence).abs().sum() / self._count),
            tokens=self._count,
        )

    def calibration(self) -> list[dict[str, Any]]:
        """The reliability diagram: confidence, accuracy and share of each bin that is not empty."""
        return [
            {
                "confidence": float(confidence / count),
                "accuracy": float(right / count),
                "share": float(count / self._count),
            }
            for count, confidence, right in self._bins.T
            if count
        ]
