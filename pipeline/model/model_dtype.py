"""The dtype in which a model folder runs without gradients."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.io.files import read_json_object
from pipeline.runtime.device import DTYPES, has_bfloat16_units, inference_dtype


def model_dtype(name: str, folder: Path, device: torch.device, *, key: str) -> torch.dtype:
    """Return the dtype in which the model of a folder runs.

    On a GPU, `auto` is the dtype that a run's model was trained in, since float16 has less range
    than the dtypes that it may have been trained in; for bfloat16 it is float32 if the GPU has no
    bfloat16 units. On a CPU, and for any other folder, `auto` is that of `inference_dtype`.

    Args:
        name: "auto", "float32", "bfloat16" or "float16".
        key: for messages: the parameter that `name` comes from.

    Raises:
        ParamsError: bfloat16 is requested on a GPU without bfloat16 units.
        DecantError: the run's run.json is damaged.
    """
    if name == "auto" and device.type == "cuda" and folder.name == "model":
        recipe = read_json_object(folder.parent / "run.json").get("train")
        trained = DTYPES.get(str(recipe.get("dtype"))) if isinstance(recipe, dict) else None
        if trained == torch.bfloat16 and not has_bfloat16_units(device):
            return torch.float32
        if trained is not None:
            return trained
    return inference_dtype(name, device, key=key)
