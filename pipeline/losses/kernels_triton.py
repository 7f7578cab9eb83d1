"""Softmax statistics and gradients of a chunk of logits, as Triton kernels.

This is the twin of `pipeline.losses.kernels_torch` for a GPU. It computes the same numbers by the
same formulas, so everything that depends on the divergence stays in the small tensors of
`pipeline.losses.chunked`, and one pair of kernels serves all divergences
(tests/losses/test_kernels.py: under Triton's interpreter, and on a GPU). They read the chunk
once, then read and write it once; PyTorch's separate kernels read or write it eight times.

Maximum and sum are computed together; the sum is rescaled whenever the maximum rises (Milakov &
Gimelshein 2018, algorithm 3). This module is imported only if Triton is usable: see
`pipeline.losses.chunked`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pipeline.losses.kernels_torch import SoftmaxStats

_BLOCK = 4096  # ids per step of a program


def softmax_stats(logits: Tensor, temperature: float) -> SoftmaxStats:
    """Compute `kernels_torch.softmax_stats`, but leave `logits` unchanged."""
    n, vocab_size = logits.shape
    peak, at_tau, at_one = logits.new_empty(3, n, 1)
    _softmax_stats[(n,)](
        logits,
        peak,
        at_tau,
        at_one,
        logits.stride(0),
        vocab_size,
        1.0 / temperature,
        two=temperature != 1.0,
        block=_BLOCK,
        num_warps=8,
    )
    return SoftmaxStats(peak=peak, at_tau=at_tau, at_one=at_tau if temperature == 1.0 else at_one)


def softmax_grad_(
    logits: Tensor, sums: SoftmaxStats, temperature: float, of_tau: Tensor, of_one: Tensor | None
) -> None:
    """Compute `kernels_torch.softmax_grad_`."""
    n, vocab_size = logits.shape
    _softmax_grad_[(n, triton.cdiv(vocab_size, _BLOCK))](
        logits,
        sums.peak,
        of_tau.contiguous(),
        of_tau if of_one is None else of_one.contiguous(),
        logits.stride(0),
        vocab_size,
        1.0 / temperature,
        two=of_one is not None,
        block=_BLOCK,
        num_warps=8,
    )


# Triton compiles the source including annotations, so constexpr is the only annotation allowed.
@triton.jit  # type: ignore[untyped-decorator]
def _softmax_stats(  # type: ignore[no-untyped-def]
    logits,
    peak,
    at_tau,
    at_one,
    stride,
    vocab_size,
    inverse_tau,
    two: tl.constexpr,
    block: tl.constexpr,
):
    """Compute the sums of one row per program."""
    row = tl.program_id(0).to(tl.int64)  # row * stride may exceed 32 bits
    start = logits + row * stride
    # The lowest float, not -inf: if all logits are -inf, -inf - -inf would be NaN.
    highest = -3.4028234663852886e38
    sum_tau = 0.0
    sum_one = 0.0
    for first in range(0, vocab_size, block):
        ids = first + tl.arange(0, block)
        z = tl.load(start + ids, mask=ids < vocab_size, other=float("-inf"))
        higher = tl.maximum(highest, tl.max(z, 0))
        sum_tau = sum_tau * tl.exp((highest - higher) * inverse_tau)
        sum_tau += tl.sum(tl.exp((z - higher) * inverse_tau), 0)
        if two:
            sum_one = sum_one * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher), 0)
        highest = higher
    tl.store(peak + row, highest)
    tl.store(at_tau + row, sum_tau)
    if two:
        tl.store(at_one + row, sum_one)


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_grad_(  # type: ignore[no-untyped-def]
    logits,
    peak,
    of_tau,
    of_one,
    stride,
    vocab_size,
    inverse_tau,
    two: tl.constexpr,
    block: tl.constexpr,
):
    """Overwrite one block of a row per program."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * block + tl.arange(0, block)
    places = logits + row * stride + ids
    x = tl.load(places, mask=ids < vocab_size, other=float("-inf")) - tl.load(peak + row)
    weighed = tl.load(of_tau + row) * tl.exp(x * inverse_tau)
    if two:
        weighed += tl.load(of_one + row) * tl.exp(x)
    tl.store(places, weighed, mask=ids < vocab_size)
