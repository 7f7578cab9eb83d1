"""Softmax statistics and gradients of a chunk of logits, written with PyTorch alone.

`softmax_stats` computes the sums that make up the loss, and `softmax_grad_` turns the logits into
their gradient; the contents of `logits` between the two calls are private to them.
`pipeline.losses.kernels_triton` is the twin for a GPU.

On a CPU only a few rows are processed at a time, so that they stay in the processor's cache from
the first pass to the last: over a whole chunk each pass would read and write main memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_BYTES_AT_ONCE_ON_CPU = 3 << 19  # logits; with equal scratch memory they fit two cores' caches


@dataclass(frozen=True)
class SoftmaxStats:
    """Sums of exponentials over rows of logits z, all float32 [n, 1]."""

    peak: Tensor  # max_v z_v; the lowest float if every logit is -inf
    at_tau: Tensor  # sum_v exp((z_v - peak) / tau), at least 1, or 0 if every logit is -inf
    at_one: Tensor  # the same at tau = 1; the same tensor if tau is 1


class SoftmaxKernels(Protocol):
    """The interface of both modules, `kernels_torch` and `kernels_triton`."""

    def softmax_stats(self, logits: Tensor, temperature: float) -> SoftmaxStats: ...

    def softmax_grad_(
        self,
        logits: Tensor,
        sums: SoftmaxStats,
        temperature: float,
        of_tau: Tensor,
        of_one: Tensor | None,
    ) -> None: ...


def softmax_stats(logits: Tensor, temperature: float) -> SoftmaxStats:
    """Compute the maximum and the sums of exponentials of each row.

    Args:
        logits: float32 [n, V], -inf at ids to be left out; overwritten.
        temperature: tau.
    """
    # `logits` keeps the exponentials at the higher of tau and 1. The others are a power of these,
    # which costs less than a second exp, and underflow sooner.
    flat, power = max(temperature, 1.0), _power_of(temperature)
    peak, flat_sum, sharp_sum = logits.new_empty(3, len(logits), 1)
    for rows, work in _blocks(logits):
        block = logits[rows]
        torch.amax(block, -1, keepdim=True, out=peak[rows])
        peak[rows].clamp_min_(torch.finfo(logits.dtype).min)
        torch.add(peak[rows] * (-1.0 / flat), block, alpha=1.0 / flat, out=block).exp_()
        torch.sum(block, -1, keepdim=True, out=flat_sum[rows])
        if power == 2.0:  # avoids writing the squares
            norm = torch.linalg.vector_norm(block, 2, -1, keepdim=True)
            torch.square(norm, out=sharp_sum[rows])
        elif power != 1.0:
            torch.sum(_raised(block, power, work), -1, keepdim=True, out=sharp_sum[rows])
    if power == 1.0:
        return SoftmaxStats(peak=peak, at_tau=flat_sum, at_one=flat_sum)
    at_tau, at_one = (flat_sum, sharp_sum) if temperature > 1.0 else (sharp_sum, flat_sum)
    return SoftmaxStats(peak=peak, at_tau=at_tau, at_one=at_one)


def softmax_grad_(
    logits: Tensor, sums: SoftmaxStats, temperature: float, of_tau: Tensor, of_one: Tensor | None
) -> None:
    """Overwrite row i with of_tau_i exp((z - peak_i) / tau) + of_one_i exp(z - peak_i).

    Args:
        logits: as left by `softmax_stats`.
        sums: returned by `softmax_stats`.
        temperature: as given to `softmax_stats`.
        of_tau, of_one: float32 [n, 1]; of_one is None if tau is 1.
    """
    if of_one is None:
        logits.mul_(of_tau)
        return
    power = _power_of(temperature)
    of_flat, of_sharp = (of_tau, of_one) if temperature > 1.0 else (of_one, of_tau)
    for rows, work in _blocks(logits):
        block = logits[rows]
        sharp = _raised(block, power, work)
        block.mul_(of_flat[rows]).addcmul_(sharp, of_sharp[rows])


def _power_of(temperature: float) -> float:
    """Return the power to which the flatter exponentials are raised to give the sharper ones."""
    return max(temperature, 1.0) / min(temperature, 1.0)


def _raised(base: Tensor, power: float, out: Tensor) -> Tensor:
    """Compute base ** power; torch.pow takes five times as long."""
    if power in (2.0, 4.0):
        torch.square(base, out=out)
        return out if power == 2.0 else out.square_()
    return torch.log(base, out=out).mul_(power).exp_()


def _blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows to process at once, with scratch memory of their shape."""
    n, vocab_size = logits.shape
    at_once = n
    if logits.device.type == "cpu":
        at_once = max(1, _BYTES_AT_ONCE_ON_CPU // (vocab_size * logits.element_size()))
    work = logits.new_empty(min(n, at_once), vocab_size)
    for first in range(0, n, at_once):
        rows = slice(first, min(first + at_once, n))
        yield rows, work[: rows.stop - rows.start]
