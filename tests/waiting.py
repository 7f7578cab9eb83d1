"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 300.0
"""Seconds until a test gives another process up.

A limit, not a measurement: on a busy machine without fast units a process needs a minute to import
PyTorch.
"""


def wait_until(condition: Callable[[], Any]) -> None:
    """Return as soon as `condition()` holds; fail when it does not within `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
