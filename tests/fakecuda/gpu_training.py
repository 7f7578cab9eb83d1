"""A training step on a GPU or the stand-in for one: the CPU's numbers, and few waits."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from pipeline.config.params import load_params
from pipeline.config.train_params import Divergence, LoraParams, TrainParams
from pipeline.data.packing import IGNORE
from pipeline.errors import ParamsError
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.model.huggingface import HuggingFaceStudent
from pipeline.model.lora import add_adapters
from pipeline.model.student import Student
from pipeline.runtime.device import training_dtype
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.targets.reduce import top_k_from_logits
from pipeline.training import trainer
from pipeline.training.batches import Batch
from pipeline.training.checkpoint import TrainState
from pipeline.training.distillation import DistillationLoss
from pipeline.training.distributed import parallelise
from pipeline.training.loss_scale import LossScale
from pipeline.training.optim import build_optimizer
from tests.fakecuda import stand_in
from tests.helpers import LORA, ROOT, SMALL
from tests.models import make_mistral

GPU = Ranks(torch.device("cuda"))
HAS_BFLOAT16 = torch.cuda.get_device_capability()[0] >= 8
FORMATS = ["float32", "float16", *(["bfloat16"] if HAS_BFLOAT16 else [])]
"""What training offers on this GPU."""

MOST_SYNCS = 1
"""Waits of the host in a step: the trainer reads the step's sums and the gradients' norm."""
MOST_PAGEABLE_COPIES = 1
"""The copy for which it waits."""

B, L, V = 2, 12, 300
TAUS = (1.0, 2.0, 0.5)
PARAMS = load_params(ROOT / "params.yaml")


@cache
def batch(k: int = 8, num_sampled: int = 0, documents: bool = True, targets: bool = True) -> Batch:
    torch.manual_seed(1)
    logits = torch.randn(B * L, V) * 3
    topk = top_k_from_logits(logits, k, TAUS, torch.rand(B * L, num_sampled))
    doc_ids = torch.zeros(B, L, dtype=torch.int32)
    doc_ids[:, L // 2 :] = 1
    labels = torch.randint(0, V, (B, L))
    labels[:, ::3] = IGNORE
    return Batch(
        tokens=torch.randint(0, V, (B, L)),
        labels=labels,
        topk=topk.map(lambda t: t.view(B, L, *t.shape[1:])) if targets else None,
        doc_ids=doc_ids if documents else None,
        num_targets=int((labels != IGNORE).sum()) if targets else 0,
    )


@cache
def own_student() -> Student:
    torch.manual_seed(0)
    return StudentModel(ModelConfig(**SMALL, max_seq_len=64))


def first_state(recipe: TrainParams) -> TrainState:
    """Return the state with which `train` starts."""
    return TrainState(loss_scale=LossScale() if recipe.dtype == "float16" else None)


def take_step(
    student: Student, batch: Batch, ranks: Ranks, run: dict[str, Any] | None = None, **recipe: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Take one optimizer step with a copy of the student; return what is logged and the weights."""
    student, recipe = deepcopy(student), PARAMS.train.model_copy(update=recipe)
    dtype = training_dtype(recipe.dtype, ranks.device)
    loss = DistillationLoss(student, dtype=dtype, head_chunk=10)
    loss = parallelise(loss, ranks, PARAMS.run.model_copy(update=run or {}))
    optimizer = build_optimizer(student, recipe)
    batch = batch.pinned() if ranks.device.type == "cuda" else batch
    values = trainer._train_step(loss, optimizer, iter([batch]), first_state(recipe), recipe, ranks)
    return values, {name: p.detach().cpu() for name, p in student.named_parameters()}


def require_same_step(student: Student, batch: Batch, **changes: Any) -> None:
    """Compare a step on the GPU with the same step on the CPU."""
    found, weights = take_step(student, batch, GPU, **changes)
    expected, expected_weights = take_step(student, batch, ALONE, **changes)
    near = {"rel": 1e-4} if changes.get("dtype", "float32") == "float32" else {"rel": 0.03}
    for name in {"train/loss", "train/ce", "train/divergence", "train/gradient_norm"} & set(found):
        assert found[name] == pytest.approx(expected[name], **near), name
    if changes.get("dtype", "float32") == "float32":
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected_weights[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("temperature", TAUS)
@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_divergences(divergence: Divergence, temperature: float) -> None:
    recipe = {"divergence": divergence, "temperature": temperature, "dtype": "float32"}
    require_same_step(own_student(), batch(), **recipe)


TARGETS: dict[str, dict[str, Any]] = {
    "rows of one document": {"documents": False},
    "all ids kept": {"k": V},
    "sampled ids": {"k": 4, "num_sampled": 6},
    "sampled ids alone": {"k": 0, "num_sampled": 6},
    "no teacher": {"targets": False},
}


@pytest.mark.parametrize("temperature", TAUS)
@pytest.mark.parametrize("targets", TARGETS)
def test_targets(targets: str, temperature: float) -> None:
    recipe = {"temperature": temperature, "dtype": "float32"}
    recipe["targets"] = "none" if targets == "no teacher" else "cached"
    require_same_step(own_student(), batch(**TARGETS[targets]), **recipe)


def test_targets_that_are_on_the_gpu() -> None:
    """As an online teacher leaves them."""
    cached = batch()
    assert cached.topk is not None
    live = replace(cached, topk=cached.topk.map(Tensor.cuda))
    found, _ = take_step(own_student(), live, GPU, dtype="float32")
    expected, _ = take_step(own_student(), cached, ALONE, dtype="float32")
    assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-4)


def with_adapters(student: Student) -> Student:
    student = deepcopy(student)
    add_adapters(student, LoraParams(**LORA))
    return student


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("adapt", [deepcopy, with_adapters], ids=["all weights", "lora"])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", ["own", "own, a qwen3", "transformers"])
def test_students(
    kind: str,
    dtype: str,
    adapt: Callable[[Student], Student],
    checkpointing: bool,
    tmp_path: Path,
) -> None:
    student = own_student()
    if kind == "own, a qwen3":
        student = StudentModel(ModelConfig(**SMALL, max_seq_len=64, head_dim=16, qk_norm=True))
    if kind == "transformers":
        student = HuggingFaceStudent(make_mistral(tmp_path))
    for documents in (False, True):
        changes = {"run": {"activation_checkpointing": checkpointing}, "dtype": dtype}
        require_same_step(adapt(student), batch(documents=documents), **changes)


@pytest.mark.skipif(HAS_BFLOAT16, reason="for GPUs before Ampere")
def test_bfloat16_is_refused_where_there_are_no_units() -> None:
    with pytest.raises(ParamsError, match=r"^train.dtype=bfloat16, but .* has no bfloat16 units"):
        training_dtype("bfloat16", GPU.device)
    assert training_dtype("auto", GPU.device) == torch.float16


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_step_waits_rarely(dtype: str) -> None:
    student = deepcopy(own_student())
    recipe = PARAMS.train.model_copy(update={"dtype": dtype})
    loss = DistillationLoss(student, dtype=training_dtype(dtype, GPU.device), head_chunk=10)
    loss = parallelise(loss, GPU, PARAMS.run)
    optimizer = build_optimizer(student, recipe)
    batches = iter([batch().pinned() for _ in range(2)])
    state = first_state(recipe)
    trainer._train_step(loss, optimizer, batches, state, recipe, GPU)
    with stand_in.counting() as counts:
        trainer._train_step(loss, optimizer, batches, state, recipe, GPU)
    stand_in.show(f"a training step in {dtype}", counts)
    assert stand_in.total(counts, "sync") <= MOST_SYNCS
    assert stand_in.total(counts, "pageable") <= MOST_PAGEABLE_COPIES
