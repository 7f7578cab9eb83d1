"""What `auto` means for the sizes of batches and chunks."""

from __future__ import annotations

import pytest
import torch

from pipeline.runtime.batch_sizes import (
    chunk_on_gpu,
    gpu_memory,
    resolve_batch_rows,
    resolve_head_chunk,
)


def test_a_number_stays_what_it_is() -> None:
    assert resolve_batch_rows(3, 1024, "cuda") == 3
    assert resolve_head_chunk(50, 304, gpu_memory(torch.device("cpu"))) == 50


def test_on_a_cpu_auto_is_what_fits_its_cache() -> None:
    assert resolve_batch_rows("auto", 256, "cpu") == 8
    assert resolve_head_chunk("auto", 151_936, gpu_memory(torch.device("cpu"))) == 256


@pytest.mark.parametrize(("row_length", "rows"), [(256, 64), (1024, 16), (32_768, 1)])
def test_on_a_gpu_a_forward_has_16384_tokens(row_length: int, rows: int) -> None:
    assert resolve_batch_rows("auto", row_length, "cuda") == rows


@pytest.mark.parametrize(
    ("memory", "vocab_size", "chunk"),
    [
        (16e9, 151_936, 256),  # a T4: 256 x 151,936 x 4 bytes = 156 MB of 250
        (16e9, 49_152, 1024),
        (24e9, 151_936, 512),
        (80e9, 151_936, 2048),  # an H100: 1.24 GB of 1.25
        (80e9, 49_152, 4096),
        (80e9, 304, 4096),
    ],
)
def test_a_chunk_takes_a_64th_of_a_gpu(memory: float, vocab_size: int, chunk: int) -> None:
    assert chunk_on_gpu(memory, vocab_size) == chunk
