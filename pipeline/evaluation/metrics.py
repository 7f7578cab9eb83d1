"""Metrics of a language model, position by position, and their summary.

Values of single positions are kept (16 bytes per position and model), because quantiles and
resampling need them. Means are taken in float64 over all positions, so the result does not depend
on how positions were chunked.

Shapes: n positions, V vocabulary rows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import DecantError
from pipeline.evaluation.results import CalibrationBin, KLStatistics, Scores
from pipeline.runtime.bootstrap import intervals
from pipeline.runtime.position_values import PositionValues


class PositionScores:
    """The scores of positions, with the expected calibration error (Guo et al. 2017, eq. 3).

    ECE = sum_b (n_b / n) |accuracy_b - confidence_b| over equal-width bins of the confidence, which
    is the probability of the most probable id.

    Args:
        most: number of positions that can be added.
        bins: number of bins of the confidence.
        name: of the model, for messages and the reliability diagram.
        device: that of the logits.
    """

    def __init__(
        self, most: int, bins: int, name: str = "the model", device: torch.device | str = "cpu"
    ) -> None:
        self._name = name
        self._values = PositionValues(most, device)
        # Count, confidence, correct
        self._bins = torch.zeros(3, bins, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor, teacher_log_p: Tensor) -> None:
        """Score n positions.

        Args:
            logits: float32 [n, V].
            labels: int64 [n].
            teacher_log_p: float32 [n, V_teacher] with V_teacher <= V; further ids of the student
                have no teacher mass.

        The scores stay on the device of the logits, which is not waited for.
        """
        log_q = logits.log_softmax(-1)
        top_log_q, guess = log_q.max(-1)
        correct = guess == labels
        self._values.add(
            {
                "loss": -log_q.gather(-1, labels[:, None])[:, 0],
                "kl_to_teacher": kl_divergence(teacher_log_p, log_q),
                # argmax takes 3.5 times as long as max.
                "top1_agreement": guess == teacher_log_p.max(-1).indices,
                "accuracy": correct,
            }
        )
        confidence = top_log_q.exp().double()
        bins = self._bins.shape[1]
        index = (confidence.nan_to_num() * bins).long().clamp_max(bins - 1)
        values = torch.stack([torch.ones_like(confidence), confidence, correct.double()])
        self._bins.index_add_(1, index, values)

    def values(self) -> dict[str, NDArray[np.float32]]:
        """Return each metric that is a mean over positions, [n], in the order they were added.

        Raises:
            DecantError: a loss or a divergence is not finite.
        """
        values = self._values.by_name()
        if not bool(torch.isfinite(values["loss"] + values["kl_to_teacher"]).all()):
            raise DecantError(
                f"{self._name} predicts probabilities that are 0 or not numbers: its training has "
                "diverged, or its logits overflow: set evaluate.dtype=float32, or leave it out"
            )
        return {name: tensor.numpy() for name, tensor in values.items()}

    def scores(self, clusters: NDArray[np.int64]) -> Scores:
        """Return the means over all positions added so far, with their intervals.

        Args:
            clusters: [n], the document of each position, or another unit to resample.
        """
        values = self.values()
        mean = {name: float(value.mean(dtype=np.float64)) for name, value in values.items()}
        _, confidence, right = self._bins.cpu()
        return Scores(
            **mean,
            perplexity=math.exp(min(mean["loss"], 700.0)),
            calibration_error=float((right - confidence).abs().sum() / len(clusters)),
            tokens=len(clusters),
            kl=kl_statistics(values["kl_to_teacher"]),
            interval=intervals(values, clusters),
        )

    def calibration(self) -> list[CalibrationBin]:
        """Return the reliability diagram."""
        bins = self._bins.cpu()
        total = bins[0].sum()
        return [
            CalibrationBin(
                model=self._name,
                confidence=float(confidence / count),
                accuracy=float(right / count),
                share=float(count / total),
            )
            for count, confidence, right in bins.T
            if count
        ]


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of each position in nats: sum_v p (log p - log q), [n].

    Args:
        log_p: float32 [n, V_p].
        log_q: float32 [n, V] with V_p <= V; p is 0 on the further ids.
    """
    divergence: Tensor = (log_p.exp() * (log_p - log_q[:, : log_p.shape[-1]])).sum(-1)
    return divergence.clamp_min(0.0)  # it is negative only by rounding


def kl_statistics(divergences: NDArray[np.float32]) -> KLStatistics:
    """Return the mean and exact quantiles over positions [n]."""
    exact = divergences.astype(np.float64)
    median, p90, p95, p99, largest = np.quantile(exact, [0.5, 0.9, 0.95, 0.99, 1.0]).tolist()
    return KLStatistics(
        mean=float(exact.mean()), median=median, p90=p90, p95=p95, p99=p99, max=largest
    )
