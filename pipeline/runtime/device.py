"""Device, number formats and seeds: everything that depends on the machine's hardware.

`auto` takes the fastest format for which the hardware has units of its own. On x86 these are AMX's:
without them bfloat16 is emulated, 6 to 60 times slower than float32 (measured with PyTorch 2.13 on
AVX2), or multiplied by AVX512-BF16, 1.2 to 1.9 times slower than float32 (on a Xeon of the fourth
or fifth generation whose AMX the virtual machine hides), so `auto` is float32 there. A GPU runs
inference in float16 and trains in bfloat16, which needs no loss scaling because of its range. GPUs
before Ampere have no units for bfloat16; they train in float16 with loss scaling.
"""

from __future__ import annotations

import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Mapping
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
"""A format counts as slow if it takes this many times as long as float32; less may be noise."""


def pick_device(name: str) -> torch.device:
    """Return the device by name; `auto` is the GPU if there is one, else the CPU.

    A GPU that is named by its number becomes PyTorch's current one, on which Triton's kernels and
    tensors on plain "cuda" are.

    Raises:
        ParamsError: the name is `cuda` or `cuda:N`, and PyTorch cannot use that GPU.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    _sum_in_float32()
    if name == "auto":
        return torch.device("cuda")
    if not torch.cuda.is_available():
        raise ParamsError(f"device={name}, but {_why_no_gpu()}: set device to auto or cpu")
    device = torch.device(name)
    if device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise ParamsError(
                f"device={name}, but GPUs are numbered from 0 and PyTorch finds "
                f"{torch.cuda.device_count()}: choose one of them (CUDA_VISIBLE_DEVICES may hide "
                "others)"
            )
        torch.cuda.set_device(device)
    return device


def _sum_in_float32() -> None:
    """Let matrix products on GPUs keep float32's precision, whatever PyTorch's defaults are.

    float32 then means float32 and not TF32, whose factors have 10 bits, and products of half
    formats add up in float32 throughout, where PyTorch may otherwise round partial sums.
    """
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False  # convolutions, of some teachers
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_bf16_reduced_precision_reduction = False


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
    """Check for the compiler that torch.compile needs: C++ on a CPU, C for Triton on CUDA.

    Raises:
        ParamsError: there is no such compiler.
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
    """Return the format in which a model runs without gradients; `auto` is float16 on a GPU.

    Args:
        name: "auto", "float32", "bfloat16" or "float16".
        key: for messages: the source of `name`, for example a parameter.
        remedy: for messages: what to do if the format is slow or missing; by default, to set the
            parameter.

    Raises:
        ParamsError: bfloat16 is requested on a GPU without bfloat16 units.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else _fastest_wide_range(device)
    dtype = DTYPES[name]
    computed = compute_dtype(dtype, device)
    _check_units(dtype, computed, device, key, remedy or f"set {key} to auto or float32")
    return dtype


def training_dtype(name: str, device: torch.device, *, key: str = "train.dtype") -> torch.dtype:
    """Return autocast's format in training; `auto` is bfloat16 if there are units for it.

    Otherwise it is float16 with loss scaling on a GPU, and float32 on a CPU. On a CPU, float16
    really is computed in float16 here, which only serves to check it.

    Raises:
        ParamsError: bfloat16 is requested on a GPU without bfloat16 units.
    """
    if name != "auto":
        dtype = DTYPES[name]
        _check_units(dtype, dtype, device, key, f"set {key} to auto or float32")
        return dtype
    dtype = _fastest_wide_range(device)
    if device.type == "cuda" and dtype == torch.float32:
        say(f"{key}=auto is float16 here: {_gpu_name(device)} has no bfloat16 units")
        return torch.float16
    return dtype


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the format in which a model with weights in `dtype` computes.

    It is `dtype` itself, except for float16 on a CPU, which has no units for it: there the weights
    are rounded to float16, as a GPU would hold them, and products are computed in float32.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype


def place_rounded(model: Model, dtype: torch.dtype, device: torch.device) -> Model:
    """Move `model` to `device` with weights rounded to `dtype`, ready to compute (compute_dtype).

    Buffers keep their format: RoPE's frequencies are float32 whatever the weights are, and rounding
    them would rotate distant positions by wrong angles. So do float32 weights among weights that
    are in `dtype` already, which transformers keeps for some architectures (routers, norms of
    gpt-oss). A quantised model of transformers is returned as it is: it was loaded to its device,
    and a conversion would destroy its weights.
    """
    if getattr(model, "is_quantized", False):
        return model
    target = compute_dtype(dtype, device)
    is_rounded = any(parameter.dtype == dtype for parameter in model.parameters())
    for parameter in model.parameters():
        if not (is_rounded and parameter.dtype == torch.float32):
            parameter.data = parameter.data.to(dtype).to(device=device, dtype=target)
    return model.to(device)


def has_bfloat16_units(device: torch.device) -> bool:
    """Return whether the hardware multiplies bfloat16 itself, faster than float32.

    It does on x86 with AMX, and on NVIDIA GPUs from Ampere on. PyTorch is asked rather than the
    operating system, since its oneDNN may be restricted to AVX2 (ONEDNN_MAX_CPU_ISA=AVX2).

    With these units a product can also round its float32 factors to bfloat16, at their speed.
    """
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    return _cpu_has_bfloat16_units()


@cache
def _cpu_has_bfloat16_units() -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    usable: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # also true for AVX512 emulation
    if platform.machine().lower() in ("x86_64", "amd64"):
        return usable and torch.cpu._is_amx_tile_supported()
    return usable


def _fastest_wide_range(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if has_bfloat16_units(device) else torch.float32


def _check_units(
    dtype: torch.dtype, computed: torch.dtype, device: torch.device, key: str, remedy: str
) -> None:
    """Warn of a format that is slow on a CPU; refuse bfloat16 on a GPU without units for it.

    Args:
        computed: the format of the products, which may differ from that of the weights.
    """
    if device.type == "cpu":
        _warn_if_slow(key, computed, remedy)
    elif dtype == torch.bfloat16 and not has_bfloat16_units(device):
        raise ParamsError(
            f"{key}=bfloat16, but {_gpu_name(device)} has no bfloat16 units (NVIDIA GPUs have them "
            f"from compute capability 8.0, Ampere, on): {remedy}"
        )


def _gpu_name(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


@cache
def _warn_if_slow(key: str, dtype: torch.dtype, remedy: str) -> None:
    """Warn in one line how much slower than float32 a format is on this CPU, once per key."""
    has_units = dtype == torch.bfloat16 and _cpu_has_bfloat16_units()
    if dtype == torch.float32 or has_units:
        return
    factor = _linear_seconds(dtype) / _linear_seconds(torch.float32)
    if factor >= _SLOWER:
        say(
            f"warning: {key}={dtype_name(dtype)} takes {factor:.1f} times as long as float32 on "
            f"this processor, which has no fast units for it: {remedy}"
        )


def _linear_seconds(dtype: torch.dtype) -> float:
    """Time a linear layer of 576 x 1536 over 64 positions, in seconds: the best of three runs."""
    x, weight = torch.ones(64, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that work takes once warm: it runs twice, and the second run is timed."""
    for _ in range(2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name used in params.yaml and fingerprints: torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def describe_dtypes(dtypes: Mapping[str, torch.dtype]) -> str:
    """Describe the formats of several models by name: "float16", or "float16 (one), float32 (two)".

    Only models with different formats are named.
    """
    names: dict[str, list[str]] = {}
    for model, dtype in dtypes.items():
        names.setdefault(dtype_name(dtype), []).append(model)
    if len(names) == 1:
        return next(iter(names))
    return ", ".join(f"{dtype} ({', '.join(models)})" for dtype, models in names.items())


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
