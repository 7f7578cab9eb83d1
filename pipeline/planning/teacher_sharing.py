"""How many devices share one teacher in the stages that run it: prepare, verify and evaluate.

A teacher that fits on one device runs there whole, and further devices run others. One that does
not is divided among all of advise.devices under torchrun, by the rules of
pipeline/teacher/sharded.py, if its weights are not quantised. vLLM takes the devices that
prepare.vllm.options say.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from pipeline.config.params import Params
from pipeline.errors import ParamsError
from pipeline.planning.decoder_shape import Shape
from pipeline.runtime.optional import import_transformers


@dataclass(frozen=True)
class Sharing:
    """The devices that share one teacher, and how its weights are divided among them."""

    devices: int = 1
    parallel: Literal["tensor", "fsdp", "vllm"] = "tensor"  # without meaning for one device

    def speedup(self, rows: int) -> float:
        """Return how many times faster a forward of so many rows is than on one device.

        Under fsdp, each device computes whole rows, so fewer rows than devices leave some idle.
        """
        if self.parallel != "fsdp":
            return float(self.devices)
        return rows / ceil(rows / self.devices)

    def describe(self) -> str:
        """Say how a stage is started so, and how the weights are divided."""
        if self.parallel == "vllm":
            return "by prepare.vllm.options"
        return f"torchrun --nproc-per-node {self.devices}, {self.parallel}"


ALONE = Sharing()


def share_teacher(teacher: Shape, params: Params, *, fits_alone: bool) -> Sharing:
    """Decide how many of advise.devices share one teacher.

    Args:
        fits_alone: whether its capture fits on one device.

    Raises:
        ParamsError: vLLM takes more devices than there are.
    """
    number = params.advise.devices
    if params.prepare.engine == "vllm":
        taken = params.prepare.vllm.num_devices
        if taken > number:
            raise ParamsError(
                f"prepare.vllm.options take {taken} devices, and advise.devices={number}: raise "
                "that, or lower tensor_parallel_size"
            )
        return ALONE if taken == 1 else Sharing(taken, "vllm")
    if fits_alone or number == 1 or teacher.weight_format is not None:
        return ALONE
    wanted = params.prepare.parallel
    tensor = wanted == "tensor" or (wanted == "auto" and _divides(teacher, number))
    return Sharing(number, "tensor" if tensor else "fsdp")


def _divides(teacher: Shape, number: int) -> bool:
    """Return whether heads and columns divide, and transformers has a plan for the layers."""
    sizes = (teacher.num_heads, teacher.num_kv_heads, teacher.intermediate_size)
    return not any(size % number for size in sizes) and _has_plan(teacher.model_type)


def _has_plan(model_type: str) -> bool:
    classes: Any = import_transformers().models.auto.configuration_auto.CONFIG_MAPPING
    if model_type not in classes:
        return False
    return any("layers" in name for name in classes[model_type].base_model_tp_plan or ())
