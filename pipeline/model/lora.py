"""Low-rank adapters by PEFT: only they are trained, and they are merged at the end.

W x becomes W x + (alpha / rank) B A x with W frozen, A [rank, in] random and B [out, rank] zero (Hu
et al. 2021, "LoRA", eq. 3), so the student starts unchanged. PEFT adds adapters to any module of
linear layers in place, so our own model and those of transformers take the same path. Both use
Hugging Face's names, so a saved adapter can be applied to the folder that the run began with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config.train_params import LoraParams
from pipeline.errors import ParamsError
from pipeline.io.ownership import atomic_folder
from pipeline.model.student import Student
from pipeline.runtime.optional import require

_LINEAR = ("Linear", "Conv1D")  # GPT-2 calls its linear layers Conv1D


def add_adapters(student: Student, params: LoraParams) -> Any:
    """Freeze the student and add adapters to its layers `params.targets`.

    Returns:
        PEFT's model over the student's body, for `merge_adapters` and `save_adapters`.

    Raises:
        ParamsError: the student does not have one of the targets.
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
    """Add each adapter's product to its matrix in place; the student is then plain, but trained."""
    adapters.merge_and_unload()


def save_adapters(adapters: Any, folder: Path, *, start: Path) -> None:
    """Write an adapter folder atomically, for `peft.PeftModel.from_pretrained` over `start`."""
    adapters.peft_config["default"].base_model_name_or_path = str(start)
    with atomic_folder(folder, "adapter", key="paths.runs") as partial:
        # By default, PEFT would ask the hub whether the vocabulary was enlarged.
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
    """Return the last parts of the names of all linear layers except the head.

    The head is excluded because losses read its matrix directly.
    """
    return {
        name.rpartition(".")[2]
        for name, module in student.body.named_modules()
        if type(module).__name__ in _LINEAR and _weight(module) is not student.head_weight
    }


def _weight(module: nn.Module) -> Any:
    return module.weight
