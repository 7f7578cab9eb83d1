"""The accumulating product and the reduction to TopK, on a GPU or the stand-in for one."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from pipeline.runtime.numerics import matmul_float32
from pipeline.targets.reduce import row_uniforms, top_k_from_logits
from pipeline.targets.topk import _TENSORS

DEVICE = torch.device("cuda")
HAS_BFLOAT16 = torch.cuda.get_device_capability()[0] >= 8
FORMATS = [torch.float32, torch.float16] + [torch.bfloat16] * HAS_BFLOAT16


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("target", ["new", "out", "add_to"])
def test_product_accumulates_in_float32(dtype: torch.dtype, target: str) -> None:
    a, b, c = torch.randn(5, 48), torch.randn(48, 300), torch.randn(5, 300)
    expected = a.to(dtype).double() @ b.to(dtype).double() + (c if target == "add_to" else 0)
    onto = {} if target == "new" else {target: c.to(DEVICE)}
    found = matmul_float32(a.to(DEVICE), b.to(DEVICE), dtype, **onto)
    assert found.dtype == torch.float32
    assert found.device.type == "cuda"
    for tensor in (found, *onto.values()):
        torch.testing.assert_close(tensor.cpu().double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 300, 5001])
def test_reduction_equals_the_cpus(vocabulary: int) -> None:
    logits = torch.randn(7, vocabulary) * 4
    for k, num_sampled, taus in product({0, 1, 16, vocabulary}, (0, 6), ((), (1.0, 2.0, 0.5))):
        if k > vocabulary or (k == vocabulary > 300):
            continue
        uniforms = row_uniforms(range(1), 7, num_sampled, 0)[0]
        expected = top_k_from_logits(logits, k, taus, uniforms)
        found = top_k_from_logits(logits.to(DEVICE), k, taus, uniforms.to(DEVICE))
        skipped = {"sampled_ids", "sampled_logprobs"} if k == vocabulary else set()
        for name in set(_TENSORS) - skipped:
            tensor = getattr(found, name)
            assert tensor.device.type == "cuda", name
            torch.testing.assert_close(tensor.cpu(), getattr(expected, name), msg=name)
