"""Peak memory of head and loss on a GPU, for 8,192 tokens of a 0.5 B student."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pipeline.losses.chunked import distillation_loss_sums
from pipeline.targets.topk import TopK
from tests.fakecuda import stand_in

N, V, D, K = 8192, 151_936, 896, 64
MIB = 1 << 20

MOST_MIB = {256: 1170, 1024: 2100}
"""Peak beyond the inputs by chunk. The gradient of the head alone is 519 MiB, one of hidden states
28 MiB, the head in bfloat16 260 MiB, and logits of a chunk 148 MiB for each 256 positions."""


def targets() -> TopK:
    """Of the right sizes; their values do not matter."""
    device = "cuda"
    return TopK(
        has_target=torch.ones(N, dtype=torch.bool, device=device),
        ids=torch.zeros(N, K, dtype=torch.int64, device=device),
        logprobs=torch.zeros(N, K, device=device),
        lse=torch.zeros(N, device=device),
        lse_tau=torch.zeros(N, 0, device=device),
        entropy=torch.zeros(N, device=device),
        sampled_ids=torch.zeros(N, 0, dtype=torch.int64, device=device),
        sampled_counts=torch.zeros(N, 0, dtype=torch.int32, device=device),
        sampled_logprobs=torch.zeros(N, 0, device=device),
        num_sampled=0,
        temperatures=(),
        vocab_size=V,
    )


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] < 8, reason="needs bfloat16 units")
@pytest.mark.parametrize("chunk", MOST_MIB)
def test_peak_of_head_and_loss(chunk: int) -> None:
    with stand_in.without_values():
        hidden = torch.empty(N, D, device="cuda", requires_grad=True)
        weight = torch.empty(V, D, device="cuda", requires_grad=True)
        labels = torch.zeros(N, dtype=torch.int64, device="cuda")
        topk = targets()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        distillation_loss_sums(
            hidden,
            weight,
            labels,
            topk,
            alpha=0.5,
            temperature=1.0,
            dtype=torch.bfloat16,
            chunk=chunk,
        ).total.backward()
        peak = (torch.cuda.max_memory_allocated() - before) / MIB
    stand_in.show(f"head and loss, chunks of {chunk}: peak {peak:,.0f} MiB", Counter())
    assert peak <= MOST_MIB[chunk]
