"""Load the head of a causal language model alone, when another engine runs the body.

The model is built without memory for its weights (PyTorch's meta device), so that transformers says
which tensor is the head, whether it is the embedding too, and how large it is. The tensor is then
read from the folder's safetensors by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.errors import DecantError, reason_of
from pipeline.model.huggingface import empty_model, without_head, without_other_inputs

_NUMBERS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Head:
    """A model's head, and what its config says."""

    weight: Tensor  # [vocabulary rows, D]
    bias: Tensor | None  # [vocabulary rows]
    config: Any  # transformers'
    num_parameters: int  # of the whole model; tied ones count once


def load_head(folder: Path, dtype: torch.dtype) -> Head:
    """Load the head of a local folder, rounded to `dtype`, on the CPU.

    Raises:
        DecantError: there is no model, its architecture is unknown, it has no head apart from its
            body, or the head's tensor is not in the folder in a format that can be read.
    """
    model = without_other_inputs(empty_model(folder))
    module = model.get_output_embeddings()
    if module is None:
        raise without_head(folder, model)
    stored = _files_of_tensors(folder)
    bias = getattr(module, "bias", None)
    return Head(
        weight=_read(folder, stored, _names(model, module.weight), module.weight).to(dtype),
        bias=None if bias is None else _read(folder, stored, _names(model, bias), bias).to(dtype),
        config=model.config,
        num_parameters=int(model.num_parameters()),
    )


def _names(model: Any, parameter: nn.Parameter) -> list[str]:
    """Return the names of a parameter, one of which a folder has; the head's comes first."""
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, other in named if other is parameter][::-1]


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a folder, by the tensor's name."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except SafetensorError as error:
            raise DecantError(
                f"{file} is damaged ({reason_of(error)}): download the whole model again"
            ) from None
    return found


def _read(folder: Path, stored: dict[str, Path], wanted: list[str], like: nn.Parameter) -> Tensor:
    """Read the first tensor that the folder has.

    Args:
        wanted: names, in the order in which they are tried. A folder may have another prefix, as
            those of models that read images do; then the last two parts of a name decide.
        like: a parameter of the tensor's size, without numbers.
    """
    ends = [".".join(name.split(".")[-2:]) for name in wanted]
    for name, end in zip(wanted, ends, strict=True):
        alike = [other for other in stored if f".{other}".endswith(f".{end}")]
        found = name if name in stored else alike[0] if len(alike) == 1 else None
        if found is None:
            continue
        with safe_open(stored[found], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(found)
        if tensor.shape == like.shape and tensor.dtype in _NUMBERS:
            return tensor
        raise DecantError(
            f"{folder} stores its head as {found}, {tuple(tensor.shape)} in {tensor.dtype}, and "
            f"not as {tuple(like.shape)} in float32, bfloat16 or float16: choose a model whose "
            "head is not quantised"
        )
    raise DecantError(
        f"{folder} holds no tensor {' or '.join(wanted)}, which would be its head: download the "
        "whole model, or choose one whose head is not quantised"
    )
