"""The smallest Triton kernel, to find out whether kernels run on a device.

This module imports Triton: see `pipeline.runtime.triton_usable`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def launch(device: torch.device) -> None:
    """Compile and start a kernel. The host waits for it, once per process."""
    count = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device(count.get_device()):
        _add_one[(1,)](count)
    if count.item() != 1:
        raise RuntimeError("a kernel ran without effect")


@triton.jit
def _add_one(count):  # type: ignore[no-untyped-def]
    tl.store(count, tl.load(count) + 1)
