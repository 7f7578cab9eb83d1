"""Repeat requests over a network that fail, with back-off."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

TRIES = 6
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; doubled after each further one, with jitter."""


class GaveUpError(Exception):
    """A request that failed for good, on attempt `number`, by the error that is its cause."""

    def __init__(self, number: int, reason: Exception) -> None:
        super().__init__(str(reason))
        self.number = number
        self.reason = reason


def with_retries(
    request: Callable[[], Result], may_pass: Callable[[Exception], bool | None]
) -> Result:
    """Return the result of a request, which is repeated while its failure may pass.

    Args:
        may_pass: says of an error whether another attempt may succeed; None raises the error as it
            is, for what is an answer rather than a failure.

    Raises:
        GaveUpError: the request failed on the last attempt, or another one cannot succeed.
    """
    for number in range(1, TRIES + 1):
        try:
            return request()
        except Exception as error:  # each library has its own; `may_pass` knows them
            passes = may_pass(error)
            if passes is None:
                raise
            if number == TRIES or not passes:
                raise GaveUpError(number, error) from error
            time.sleep(FIRST_PAUSE * 2 ** (number - 1) * random.uniform(0.5, 1.5))
    raise AssertionError
