"""Packages that are optional, slow to import, or need a setting before their import.

The optional ones are the extras of pyproject.toml; they are imported only when something needs
them. Decant is installed from its own folder. The package index has another project of the same
name, so no message may tell a user to install `decant` by name; tests/runtime/test_optional.py
checks this.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from pipeline.errors import DecantError


def install_hint(extra: str) -> str:
    """Return how to install one extra, as text to put after a colon in a message."""
    return f"install it by `pip install -e '.[{extra}]'` in Decant's folder"


def require(package: str, extra: str, user: str, *, instead: str = "") -> Any:
    """Import a package that an extra installs.

    Args:
        package: name under which the package is imported.
        extra: name of the extra in pyproject.toml.
        user: subject of the message, which needs the package.
        instead: another remedy, appended to the message.

    Raises:
        DecantError: the package is not installed, or its own import fails.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise DecantError(
            f"{user} needs the package {package} ({error}): {install_hint(extra)}{instead}"
        ) from None


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
    return require("ray", "ray", "--executor ray")
