"""Join a Ray cluster, or start one; report its errors as sentences."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.errors import DecantError, memory_shortage, reason_of
from pipeline.runtime.optional import import_ray


@contextmanager
def ray_cluster(work: str) -> Iterator[Any]:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine; yield Ray.

    Actors and tasks end with the connection, whatever they are doing.

    Args:
        work: what could be done on this machine alone, as a verb.

    Raises:
        DecantError: Ray is not installed, or the cluster cannot be reached.
    """
    ray = import_ray()
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:  # other version, or bad address
        reason = reason_of(error)
        raise DecantError(
            f"no Ray cluster was reached ({reason}): check RAY_ADDRESS, or unset it to {work} on "
            "this machine"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def errors_unwrapped(ray: Any, what: str, remedy: str) -> Iterator[None]:
    """Re-raise a task's own error; report a loss that Ray cannot repair as one sentence.

    Args:
        what: what is lost then.
        remedy: what to do before the same command continues.
    """
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DecantError) or memory_shortage(error.cause):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = reason_of(error)
        raise DecantError(
            f"Ray lost {what} ({reason}): {remedy}, then run the same command to continue"
        ) from error
