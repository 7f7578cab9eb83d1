"""Matrix products with float32 accumulation, whatever the format of their factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.runtime.device import rounds_float32_factors


def matmul_float32(
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """Compute a @ b with factors rounded to `dtype`, ACCUMULATED AND RETURNED in float32.

    A plain bf16 product returns bf16, which rounds a logit of 20 by up to 0.06, far more than
    everything else in the cache. On a CPU with AMX, oneDNN can round float32 factors itself, at the
    units' speed; without such units the factors are rounded here and multiplied in float32. On CUDA
    `out_dtype` returns the accumulator.

    Args:
        a: [n, m].
        b: [m, p].
        dtype: float32, bfloat16 or float16.
        out: optional float32 [n, p] to write into.
        add_to: optional float32 [n, p] to which the product is added in place (beta = 1).
    """
    if a.device.type == "cuda" and dtype != torch.float32:
        product = torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
        if add_to is not None:
            return add_to.add_(product)
        return product if out is None else out.copy_(product)
    by_units = dtype == torch.bfloat16 and rounds_float32_factors(a.device)
    if not by_units:  # round the factors, multiply in float32
        a, b = a.to(dtype), b.to(dtype)
    a, b = a.float(), b.float()
    with _cpu_matmul_precision("bf16" if by_units else "ieee"):
        if add_to is not None:
            return add_to.addmm_(a, b)
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


@contextmanager
def _cpu_matmul_precision(precision: str) -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
