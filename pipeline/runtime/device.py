"""Device, number formats, seeds: what depends on the machine's hardware.

`auto` takes the fastest format that the hardware computes with units of its own. A processor
without units for bfloat16 emulates it, 6 to 60 times slower than float32 (measured with PyTorch
2.13 on AVX2), so there `auto` is float32. A GPU runs inference in float16 and trains in bfloat16,
whose range needs no loss scaling.
"""

from __future__ import annotations

import os
import platform
import random
import shutil
import time
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from pipeline.errors import ParamsError
from pipeline.runtime.console import say

Model = TypeVar("Model", bound=nn.Module)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SLOWER = 1.2
"""A format is called slow when it takes this many times as long as float32; less may be noise."""


def pick_device(name: str) -> torch.device:
    """`auto` takes the GPU where there is one; `cpu` and `cuda` are taken at their word.

    Raises:
        ParamsError: `cuda` where PyTorch can use no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ParamsError(f"device=cuda, but {_why_no_gpu()}: set device to auto or cpu")
    return torch.device(name)


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is a build without CUDA"
    if torch.cuda.device_count() == 0:
        return (
            f"PyTorch {torch.__version__} is a CUDA build that finds no GPU or no NVIDIA driver "
            "(nvidia-smi shows both)"
        )
    return "the NVIDIA driver is too old for this PyTorch, or the GPU is in use exclusively"


def require_compiler(device: torch.device) -> None:
    """Check that there is what torch.compile needs: a C++ compiler on a CPU, C for Triton on CUDA.

    Raises:
        ParamsError: there is none.
    """
    variable, usual = ("CC", "gcc clang") if device.type == "cuda" else ("CXX", "g++ clang++")
    wanted = os.environ.get(variable, usual).split()
    if not any(shutil.which(name) for name in wanted):
        raise ParamsError(
            f"run.compile=true needs a compiler on this machine, and {' or '.join(wanted)} is "
            f"not found: install one, name another in the variable {variable}, or set "
            "run.compile=false"
        )


def inference_dtype(name: str, device: torch.device, *, key: str, remedy: str = "") -> torch.dtype:
    """The format in which a model is run without gradients; `auto` is float16 on a GPU.

    Args:
        name: "auto", "float32", "bfloat16" or "float16".
        key: what holds `name`, a parameter for example; remedy: what to do where the format is slow
            or missing, by default to set the parameter. Both are for messages.

    Raises:
        ParamsError: bfloat16 on a GPU that has none.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else _fastest_wide_range(device)
    return _asked_for(name, device, key, remedy or f"set {key} to auto or float32")


def training_dtype(name: str, device: torch.device, *, key: str = "train.dtype") -> torch.dtype:
    """Autocast's format in training; `auto` is bfloat16 where there are units for it, else float32.

    float16 is not among them: its gradients need loss scaling.

    Raises:
        ParamsError: bfloat16 on a GPU that has none.
    """
    if name != "auto":
        return _asked_for(name, device, key, f"set {key} to auto or float32")
    dtype = _fastest_wide_range(device)
    if device.type == "cuda" and dtype == torch.float32:
        say(f"{key}=auto is float32 here: {_gpu_name(device)} has no bfloat16 units")
    return dtype


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The format in which a model with weights in `dtype` is computed.

    That is `dtype` itself, except for float16 on a CPU, which has no units for it: the weights are
    rounded to float16, as a GPU would hold them, and products are made in float32.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype


def place_rounded(model: Model, dtype: torch.dtype, device: torch.device) -> Model:
    """`model` on `device` with its weights rounded to `dtype`, ready to compute (compute_dtype).

    Buffers keep their format: RoPE's frequencies are float32 whatever the weights are, and rounding
    them would turn distant positions by wrong angles.
    """
    target = compute_dtype(dtype, device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(device=device, dtype=target)
    return model.to(device)


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself: AMX or AVX512-BF16, or a GPU from Ampere on.

    PyTorch is asked, not the operating system, since its oneDNN may be told to use AVX2 alone
    (ONEDNN_MAX_CPU_ISA=AVX2).
    """
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    return _cpu_has_bfloat16_units()


def rounds_float32_factors(device: torch.device) -> bool:
    """Whether a product of float32 factors can round them to bfloat16 itself, at its units' speed.

    On x86 oneDNN does so by AMX alone; AVX512-BF16 takes factors that are bfloat16 already.
    """
    if not has_bfloat16_units(device):
        return False
    return not _is_x86() or torch.cpu._is_amx_tile_supported()


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@cache
def _cpu_has_bfloat16_units() -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    usable: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # true for emulation on AVX512 too
    if _is_x86():
        cpu = torch.cpu
        return usable and (cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())
    return usable


def _fastest_wide_range(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if has_bfloat16_units(device) else torch.float32


def _asked_for(name: str, device: torch.device, key: str, remedy: str) -> torch.dtype:
    dtype = DTYPES[name]
    if device.type == "cpu":
        _warn_if_slow(key, compute_dtype(dtype, device), remedy)
    elif dtype == torch.bfloat16 and not has_bfloat16_units(device):
        raise ParamsError(
            f"{key}=bfloat16, but {_gpu_name(device)} has no bfloat16 units (NVIDIA GPUs have them "
            f"from compute capability 8.0, Ampere, on): {remedy}"
        )
    return dtype


def _gpu_name(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


@cache
def _warn_if_slow(key: str, dtype: torch.dtype, remedy: str) -> None:
    """Say in one line how much slower than float32 a format is on this CPU, once for each key."""
    if dtype == torch.float32 or _cpu_has_bfloat16_units():
        return
    factor = _linear_seconds(dtype) / _linear_seconds(torch.float32)
    if factor >= _SLOWER:
        say(
            f"warning: {key}={dtype_name(dtype)} takes {factor:.1f} times as long as float32 on "
            f"this processor, which has no units for it: {remedy}"
        )


def _linear_seconds(dtype: torch.dtype) -> float:
    """Seconds that a linear layer of 576 x 1536 takes over 64 positions: the best of three."""
    x, weight = torch.ones(64, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that a piece of work takes once warm: it runs twice, and the second run is timed."""
    for _ in range(2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16", as it stands in params.yaml and fingerprints."""
    return str(dtype).removeprefix("torch.")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
