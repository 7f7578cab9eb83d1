"""Copies between host and GPU for which neither waits.

A copy from ordinary memory to a GPU ends, in PyTorch, with a wait for all work queued there, and so
does one from the GPU. Copies from and to page-locked memory are queued like any other work.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device, as `tensor.to(device)`, without waiting for a GPU."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def begin_copy_to_host(tensor: Tensor) -> Tensor:
    """Queue a copy to CPU memory; on a GPU it holds the numbers once the work there is done."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
