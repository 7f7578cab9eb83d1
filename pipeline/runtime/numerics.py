"""Matrix products with float32 accumulation, whatever the format of their factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.runtime.device import has_bfloat16_units


def as_factor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the form in which `matmul_float32` multiplies it, for many products.

    It is rounded to `dtype`, and on a CPU stored in float32 again. On a CPU with AMX, oneDNN rounds
    float32 factors itself, at the units' speed, so bfloat16 is left to it.
    """
    if tensor.device.type != "cpu":
        return tensor.to(dtype)
    return tensor.float() if _rounded_by_units(dtype, tensor) else tensor.to(dtype).float()


def matmul_float32(
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    add_to: Tensor | None = None,
    prepared: bool = False,
) -> Tensor:
    """Compute a @ b with factors rounded to `dtype`, ACCUMULATED AND RETURNED in float32.

    A plain bf16 product returns bf16, which rounds a logit of 20 by up to 0.06, far more than
    everything else in the cache. A CPU without units for bfloat16 rounds the factors and multiplies
    them in float32. On CUDA `out_dtype` returns the accumulator.

    Args:
        a: [n, m].
        b: [m, p].
        dtype: float32, bfloat16 or float16.
        out: optional float32 [n, p] to write into.
        add_to: optional float32 [n, p] to which the product is added in place (beta = 1).
        prepared: whether both factors come from `as_factor` with this dtype.
    """
    if not prepared:
        a, b = as_factor(a, dtype), as_factor(b, dtype)
    if a.device.type == "cuda" and dtype != torch.float32:
        if add_to is not None:
            return torch.addmm(add_to, a, b, out_dtype=torch.float32, out=add_to)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    with _cpu_matmul_precision("bf16" if _rounded_by_units(dtype, a) else "ieee"):
        if add_to is not None:
            return add_to.addmm_(a, b)
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def _rounded_by_units(dtype: torch.dtype, factor: Tensor) -> bool:
    return dtype == torch.bfloat16 and has_bfloat16_units(factor.device)


@contextmanager
def _cpu_matmul_precision(precision: str) -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
