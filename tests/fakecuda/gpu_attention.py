"""Which attention kernel PyTorch picks where the project asks, by dtype, mask and grouped heads.

The `math` kernel holds B x H x L x L scores, which a training step cannot afford.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from pipeline.generation.sampling import GenerationSettings, generate_ids
from pipeline.model.decoder import ModelConfig, StudentModel
from tests.fakecuda import stand_in

CAPABILITY = torch.cuda.get_device_capability()
HAS_BFLOAT16 = CAPABILITY[0] >= 8
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_BFLOAT16 else [])]


@contextmanager
def picked() -> Iterator[list[SDPBackend]]:
    """Record the kernel that PyTorch picks for each call of attention within the block."""
    found: list[SDPBackend] = []
    attention = F.scaled_dot_product_attention

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(SDPBackend(torch._fused_sdp_choice(*args, **kwargs)))
        return attention(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", recorded)
        yield found


def student(dtype: torch.dtype) -> StudentModel:
    config = ModelConfig(
        hidden_size=256,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=64,
        vocab_size=64,
        max_seq_len=128,
    )
    return StudentModel(config).to(device="cuda", dtype=dtype)


def forward(model: StudentModel, documents: bool) -> None:
    tokens = torch.randint(0, 64, (2, 64), device="cuda")
    doc_ids = torch.arange(64, device="cuda").expand(2, 64) // 32
    model.hidden_states(tokens, doc_ids if documents else None)


def decode(model: StudentModel, prompts: list[list[int]]) -> None:
    generate_ids(model.eval(), prompts, GenerationSettings(max_new_tokens=3))


CASES: dict[str, Callable[[StudentModel], None]] = {
    "training, rows of one document": lambda model: forward(model, False),
    "training, documents apart": lambda model: forward(model, True),
    "generation, one prompt": lambda model: decode(model, [[1, 2, 3]]),
    "generation, padded prompts": lambda model: decode(model, [[1, 2, 3], [1, 2]]),
}
SLOW = {
    (case, dtype)
    for case in ("training, rows of one document", "generation, one prompt")
    for dtype in [torch.float32, *([] if HAS_BFLOAT16 else [torch.float16])]
}
"""Cases that take the math kernel today: grouped heads without a mask. Empty it by a change."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_is_fused(case: str, dtype: torch.dtype) -> None:
    model = student(dtype)
    with picked() as found:
        CASES[case](model)
    names = sorted({kernel.name for kernel in found})
    stand_in.show(f"attention, {case}, {dtype}: {', '.join(names)}", Counter())
    assert found
    assert (SDPBackend.MATH in found) == ((case, dtype) in SLOW)
