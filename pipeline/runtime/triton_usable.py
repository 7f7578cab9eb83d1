"""Decide whether a device runs Triton kernels; everything that has such kernels asks here.

Triton compiles a launcher in C when the first kernel starts, so that an installed Triton fails on a
machine without a C compiler or Python's header files, and on a GPU that it does not support.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch

from pipeline.runtime.console import say


def triton_usable(device: torch.device) -> bool:
    """Return whether Triton kernels run on a device; on a GPU the first call starts one.

    If they do not, one line says what is missing, and the caller uses PyTorch's operators.
    """
    return device.type == "cuda" and _runs_on(device)


@cache
def _runs_on(device: torch.device) -> bool:
    # Any error: of the import, of the C compiler, of the driver, of the assembler for this GPU.
    try:
        _launch(device)
    except Exception as error:
        say(
            f"warning: Triton kernels do not run on {device}, and PyTorch's operators, which "
            f"take more time, replace them: {_cause(error)}"
        )
        return False
    return True


def _launch(device: torch.device) -> None:
    from pipeline.runtime import triton_probe  # it imports triton

    triton_probe.launch(device)


def _cause(error: Exception) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (PyTorch's CUDA builds for Linux require it)"
    missing = []
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "clang")):
        missing.append("a C compiler (on Debian and Ubuntu: apt install gcc)")
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        missing.append("Python.h (on Debian and Ubuntu: apt install python3-dev)")
    if missing:
        return f"this machine lacks {' and '.join(missing)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
