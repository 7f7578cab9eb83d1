"""How much is computed at once where a parameter says `auto`: rows of a forward, rows of logits.

A GPU gets a few launches per layer and some thirty per chunk of logits, whatever their size. If
these are small, it waits for them: an H100 was busy a third of the time with a teacher of 135 M
parameters with 8,192 tokens per forward and chunks of 256 positions (docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Literal

import torch

COMPARED_ON_CPU = 64
_ROWS_ON_CPU = 8
_CHUNK_ON_CPU = 256
_TOKENS_ON_GPU = 16_384
_LEAST_CHUNK, _LARGEST_CHUNK = 256, 4096
_SHARE_OF_MEMORY = 1 / 64  # that a chunk of float32 logits takes of a GPU's memory at most


def resolve_batch_rows(wanted: int | Literal["auto"], row_length: int, device: str) -> int:
    """Return capture.batch_rows as a number of rows.

    Args:
        wanted: the parameter.
        row_length: L, tokens per row.
        device: type of the device, "cpu" or "cuda".
    """
    if wanted != "auto":
        return wanted
    return _ROWS_ON_CPU if device == "cpu" else max(1, _TOKENS_ON_GPU // row_length)


def gpu_memory(device: torch.device) -> float | None:
    """Return the bytes of a GPU's memory; None for a CPU."""
    if device.type == "cpu":
        return None
    return float(torch.cuda.get_device_properties(device).total_memory)


def resolve_head_chunk(wanted: int | Literal["auto"], vocab_size: int, memory: float | None) -> int:
    """Return capture.head_chunk or run.head_chunk as a number of positions.

    Args:
        wanted: the parameter.
        vocab_size: V, columns of the logits.
        memory: of the device, as `gpu_memory` returns it.
    """
    if wanted != "auto":
        return wanted
    return _CHUNK_ON_CPU if memory is None else chunk_on_gpu(memory, vocab_size)


def compared_at_once(vocab_size: int, memory: float | None) -> int:
    """Return the positions per chunk where models are compared, which makes copies of a chunk."""
    if memory is None:
        return COMPARED_ON_CPU
    return max(COMPARED_ON_CPU, chunk_on_gpu(memory, vocab_size) // 8)


def chunk_on_gpu(memory: float, vocab_size: int) -> int:
    """Return the positions per chunk for a GPU with `memory` bytes: a power of 2."""
    chunk = _LEAST_CHUNK
    while chunk < _LARGEST_CHUNK and 2 * chunk * 4 * vocab_size <= _SHARE_OF_MEMORY * memory:
        chunk *= 2
    return chunk
