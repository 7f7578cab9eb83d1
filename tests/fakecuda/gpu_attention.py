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
from pipeline.model import decoder
from pipeline.model.attention_mask import attend_within
from pipeline.model.decoder import ModelConfig, StudentModel
from tests.fakecuda import stand_in

CAPABILITY = torch.cuda.get_device_capability()
HAS_BFLOAT16 = CAPABILITY[0] >= 8
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_BFLOAT16 else [])]


SEGMENTS = "FlashAttention within segments"


@contextmanager
def picked() -> Iterator[list[str]]:
    """Record the kernel that PyTorch picks for each call of attention within the block."""
    found: list[str] = []
    attention = F.scaled_dot_product_attention

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(SDPBackend(torch._fused_sdp_choice(*args, **kwargs)).name)
        return attention(*args, **kwargs)

    def recorded_within(*args: Any) -> torch.Tensor:
        found.append(SEGMENTS)
        return attend_within(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", recorded)
        patch.setattr(decoder, "attend_within", recorded_within)
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
    doc_ids = torch.arange(64).expand(2, 64) // 32
    model.hidden_states(tokens, doc_ids if documents else None)


def decode(model: StudentModel, prompts: list[list[int]]) -> None:
    generate_ids(model.eval(), prompts, GenerationSettings(max_new_tokens=3))


APART = "training, documents apart"
CASES: dict[str, Callable[[StudentModel], None]] = {
    "training, rows of one document": lambda model: forward(model, False),
    APART: lambda model: forward(model, True),
    "generation, one prompt": lambda model: decode(model, [[1, 2, 3]]),
    "generation, padded prompts": lambda model: decode(model, [[1, 2, 3], [1, 2]]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_is_fused(case: str, dtype: torch.dtype) -> None:
    model = student(dtype)
    with picked() as found:
        CASES[case](model)
    stand_in.show(f"attention, {case}, {dtype}: {', '.join(sorted(set(found)))}", Counter())
    in_segments = case == APART and HAS_BFLOAT16 and dtype != torch.float32
    assert (found == [SEGMENTS]) == in_segments  # the student has one layer
    assert found
    assert SDPBackend.MATH.name not in found
