"""Packages that are slow to import, and extras that may not be installed."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

from pipeline.errors import DecantError


def import_transformers() -> Any:
    """The transformers library, without progress bars of its own.

    Imported when needed, since that takes seconds and half of the stages do without.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def import_ray() -> Any:
    """Ray, an extra, with the usage statistics off that it would otherwise send to its makers.

    Raises:
        DecantError: it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # for the clusters that this process starts
    try:
        import ray
    except ImportError:
        raise DecantError(
            "--engine ray needs the package ray: install it by `pip install decant[ray]`"
        ) from None
    return ray


def import_peft() -> Any:
    """PEFT, an extra, for adapters of low rank.

    Raises:
        DecantError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise DecantError(
            "student.lora needs the package peft: install it by `pip install decant[lora]`"
        ) from None
    return peft


@cache
def has_triton() -> bool:
    """Whether Triton can be imported; PyTorch's CUDA builds for Linux bring it along."""
    return importlib.util.find_spec("triton") is not None
