"""Adapters of low rank by PEFT: only they are trained, and at the end they are merged.

W x becomes W x + (alpha / rank) B A x with W frozen, A [rank, in] at random and B [out, rank] zero
(Hu et al. 2021, "LoRA", eq. 3), so a student starts as what it was. PEFT puts them into any module
of linear layers in place: our own model and those of transformers take the same path, and since
both have Hugging Face's names, a saved adapter opens over the folder that the run began with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config import LoraParams
from pipeline.errors import ParamsError
from pipeline.extras import require
from pipeline.model.base import Student
from pipeline.storage import atomic_folder

_LINEAR = ("Linear", "Conv1D")  # GPT-2 calls its linear layers Conv1D


def add_adapters(student: Student, params: LoraParams) -> Any:
    """Freeze the student and put adapters beside its layers `params.targets`.

    Returns:
        PEFT's model over the student's body, for `merge_adapters` and `save_adapters`.

    Raises:
        ParamsError: a target that the student does not have.
        DecantError: peft is not installed.
    """
    peft = require("peft", "lora", "student.lora")
    _require_targets(student, params.targets)
    config = peft.LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=list(params.targets),
    )
    return peft.get_peft_model(student.body, config)


def merge_adapters(adapters: Any) -> None:
    """Add each product to its matrix, in place: the student is as it was before, but trained."""
    adapters.merge_and_unload()


def save_adapters(adapters: Any, folder: Path, *, start: Path) -> None:
    """Write a folder, atomically, that `peft.PeftModel.from_pretrained` puts over `start`."""
    adapters.peft_config["default"].base_model_name_or_path = str(start)
    with atomic_folder(folder, "adapter", key="paths.runs") as partial:
        # Otherwise PEFT asks the hub whether the vocabulary was enlarged.
        adapters.save_pretrained(str(partial), save_embedding_layers=False)


def _require_targets(student: Student, targets: tuple[str, ...]) -> None:
    names = linear_layers(student)
    for target in targets:
        if target not in names:
            raise ParamsError(
                f"student.lora.targets names {target}, which the student does not have: its "
                f"linear layers are {', '.join(sorted(names))}"
            )


def linear_layers(student: Student) -> set[str]:
    """The last parts of the names of all linear layers but the head, whose matrix losses read."""
    return {
        name.rpartition(".")[2]
        for name, module in student.body.named_modules()
        if type(module).__name__ in _LINEAR and _weight(module) is not student.head_weight
    }


def _weight(module: nn.Module) -> Any:
    return module.weight
