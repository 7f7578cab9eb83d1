"""Operations and memory of training against what PyTorch counts and autograd keeps."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.params import Params
from pipeline.config.source_params import TeacherParams
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.model.decoder import StudentModel
from pipeline.planning.costs import (
    activation_bytes,
    block_bytes,
    capture_memory,
    mask_bytes,
    step_operations,
    training_memory,
)
from pipeline.planning.known_shapes import KNOWN
from pipeline.planning.shapes import teacher_shape
from pipeline.runtime.device import DTYPES
from pipeline.runtime.ranks import ALONE
from pipeline.target_sources.tokens_only import TokensOnly
from pipeline.training.batches import Batch, first_rows
from pipeline.training.distillation import DistillationLoss
from pipeline.training.distributed import parallelise
from tests.helpers import change
from tests.models import small_shape

ROWS = 8
WIDE = {"hidden_size": 64, "intermediate_size": 192, "num_layers": 4}


def batch_of(params: Params, document_mask: bool) -> Batch:
    corpus = CorpusSplit(params.paths.corpus, "train")
    return next(
        first_rows(TokensOnly(corpus, shard_rows=16, document_mask=document_mask), ROWS, ROWS)
    )


def kept_bytes(params: Params, batch: Batch, student: StudentModel) -> float:
    """What autograd keeps of a batch until backward, without parameters, a token."""
    step = DistillationLoss(student, dtype=DTYPES[params.train.dtype], head_chunk=64)
    model = parallelise(step, ALONE, params.run)
    sizes: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch, alpha=0.0, temperature=1.0, divergence="forward_kl")
    known = {p.untyped_storage().data_ptr() for p in student.parameters()}
    head = student.head_weight.numel() * 4  # its gradient, which the loss keeps
    assert losses[0].requires_grad
    total = sum(size for place, size in sizes.items() if place not in known) - head
    return total / batch.tokens.numel()


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("qwen3", [{}, {"head_dim": 32, "qk_norm": True}], ids=["qwen2", "qwen3"])
def test_activations_are_what_autograd_keeps(
    document_mask: bool, dtype: str, qwen3: dict[str, Any], tiny_corpus: Params
) -> None:
    """Rounded weights, which it keeps too, are counted apart."""
    params = change(tiny_corpus, prepare={"document_mask": document_mask}, train={"dtype": dtype})
    batch = batch_of(params, document_mask)
    assert (batch.doc_ids is None) == (not document_mask)
    shape, student = small_shape(**WIDE, **qwen3)
    weights = 0 if dtype == "float32" else 2 * shape.body_matrices
    found = kept_bytes(params, batch, student) - weights / batch.tokens.numel()
    assert found == pytest.approx(activation_bytes(shape, params) + mask_bytes(params), rel=0.06)


def test_a_recomputed_block_keeps_its_input(tiny_params: Params) -> None:
    shape, _ = small_shape(**WIDE)
    params = change(tiny_params, run={"activation_checkpointing": True})
    assert activation_bytes(shape, params) == 4 * 4 * 64 + block_bytes(shape, params) + 3 * 4 * 64


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_makes_the_operations_that_pytorch_counts(
    checkpointing: bool, tiny_corpus: Params
) -> None:
    params = change(
        tiny_corpus,
        prepare={"document_mask": False},
        run={"activation_checkpointing": checkpointing},
    )
    shape, student = small_shape(**WIDE)
    model = parallelise(
        DistillationLoss(student, dtype=torch.float32, head_chunk=64), ALONE, params.run
    )
    batch = batch_of(params, False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch, alpha=0.0, temperature=1.0, divergence="forward_kl")[0].backward()
    labels, tokens = batch.num_labels, batch.tokens.numel()
    body = step_operations(shape, params) - 6 * shape.head
    # The third product of the head adds in place (addmm_), which the counter does not see.
    assert counter.get_total_flops() == tokens * body + labels * 4 * shape.head


def test_memory_worked_by_hand(tiny_params: Params) -> None:
    """Qwen2.5-0.5B: 16 bytes a parameter; halves of what is shared over two devices by fsdp."""
    shape = KNOWN["Qwen2.5-0.5B"]
    one = change(tiny_params, train={"dtype": "float32", "batch_rows": 4}, run={"head_chunk": 50})
    memory = training_memory(shape, one)
    assert memory.weights == 16 * 494_032_768
    assert memory.logits == 3 * 4 * 50 * 151_936 + 4 * 151_936 * 896
    assert memory.activations == 4 * 32 * (activation_bytes(shape, one) + 32)
    two = change(one, advise={"devices": 2}, run={"parallel": "fsdp"})
    assert training_memory(shape, two).weights == memory.weights / 2
    assert training_memory(shape, two).activations == memory.activations / 2
    assert memory.total == memory.weights + memory.logits + memory.activations
    best = training_memory(shape, change(one, train={"keep_best": True}))
    assert best.weights == 20 * 494_032_768
    bf16 = change(one, train={"dtype": "bfloat16"})
    rounded = 2 * (shape.body_matrices + shape.head)
    more = training_memory(shape, bf16)
    assert more.weights + more.logits == memory.weights + memory.logits + rounded


def test_adapters_need_no_moments_for_frozen_weights(tiny_params: Params) -> None:
    shape = KNOWN["Qwen2.5-0.5B"]
    lora = {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": ["q_proj"]}
    params = change(tiny_params, student={"lora": lora}, train={"dtype": "float32"})
    trained = 24 * 8 * (896 + 896)
    assert training_memory(shape, params).weights == 4 * 494_032_768 + 12 * trained
    whole = step_operations(shape, change(params, student={"lora": None}))
    assert step_operations(shape, params) == pytest.approx(whole * 2 / 3)


class Peak(TorchDispatchMode):
    """The largest sum of tensors that were made within it and are alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3", {"intermediate_size": 256}),
        ("qwen3_moe", {"hidden_size": 256, "moe_intermediate_size": 32}),
        ("qwen3_moe", {"hidden_size": 64, "moe_intermediate_size": 256}),
        ("gpt_oss", {"hidden_size": 256, "intermediate_size": 32}),
        ("gpt_oss", {"hidden_size": 64, "intermediate_size": 256}),
        ("gpt_oss", {"hidden_size": 64, "intermediate_size": 16, "length": 512}),
    ],
)
def test_a_capture_holds_what_a_forward_of_transformers_holds(
    model_type: str, changes: dict[str, int], tiny_params: Params, tmp_path: Path
) -> None:
    """Two documents in each of two rows, in float32."""
    length = changes.pop("length", 64)
    sizes = {"num_hidden_layers": 2}
    if model_type != "qwen3":
        sizes |= {"num_local_experts": 8, "num_experts_per_tok": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64}
    config = AutoConfig.for_model(model_type, **(sizes | changes))
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config).eval()
    positions = torch.arange(length // 2).repeat(2)[None].expand(2, -1)
    peak = Peak()
    for tensor in (*model.parameters(), *model.buffers()):
        peak.alive[tensor.untyped_storage()._cdata] = 0
    with torch.no_grad(), peak:
        model.base_model(
            input_ids=torch.zeros(2, length, dtype=torch.int64),
            position_ids=positions,
            use_cache=False,
        )
    params = change(
        tiny_params,
        capture={"batch_rows": 2},
        corpus={"row_length": length},
        student={"max_seq_len": length},
    )
    folder = TeacherParams.model_validate({"source": "folder", "folder": {"path": tmp_path}})
    memory = capture_memory(teacher_shape(folder, tmp_path)[1], params, "float32")
    assert memory.activations == pytest.approx(peak.peak, rel=0.1)


def test_capture_holds_weights_and_a_chunk_of_logits(tiny_params: Params) -> None:
    shape = KNOWN["Qwen2.5-7B"]
    memory = capture_memory(shape, tiny_params, "bfloat16")
    assert memory.weights == 2 * 7_615_616_512
    assert memory.logits == 3 * 4 * 50 * 152_064
    assert memory.activations == 4 * 32 * (2 * (4 * 3584 + 3 * 18_944) + 32)
