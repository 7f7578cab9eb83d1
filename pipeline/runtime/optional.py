"""Packages that are slow to import or that must be told something first."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

from pipeline.extras import require


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
    return require("ray", "ray", "--engine ray")


@cache
def has_triton() -> bool:
    """Whether Triton can be imported; PyTorch's CUDA builds for Linux depend on it."""
    return importlib.util.find_spec("triton") is not None
