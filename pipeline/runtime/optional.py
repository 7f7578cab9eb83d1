"""Packages that are slow to import or need a setting before their import."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

from pipeline.extras import require


def import_transformers() -> Any:
    """Import the transformers library, without its own progress bars.

    It is imported when needed, since that takes seconds and half of the stages do not need it.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def import_ray() -> Any:
    """Import Ray, an extra, without the usage statistics that it would send to its makers.

    Raises:
        DecantError: Ray is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # applies to clusters that this process starts
    return require("ray", "ray", "--engine ray")


@cache
def has_triton() -> bool:
    """Return whether Triton can be imported; PyTorch's CUDA builds for Linux depend on it."""
    return importlib.util.find_spec("triton") is not None
