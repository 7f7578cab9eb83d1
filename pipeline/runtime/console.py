"""Messages, progress bars and Ctrl-C. This module does not import PyTorch."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable
from typing import Any, Self, TypeVar

from tqdm import tqdm

from pipeline.errors import printable
from pipeline.runtime.launch import is_first_rank

Item = TypeVar("Item")


def progress(
    items: Iterable[Item], *, what: str, unit: str, total: int | None = None
) -> tqdm[Item]:
    """Iterate with a progress bar that shows rate and time left; only rank 0 shows it.

    If standard error is not a terminal, for example a log file, a line appears every ten seconds.
    """
    interactive = sys.stderr.isatty()
    return tqdm(
        items,
        desc=printable(what),
        total=total,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=interactive,
        mininterval=0.2 if interactive else 10.0,
        maxinterval=10.0,
        leave=interactive,
        disable=not is_first_rank(),
    )


def progress_bar(*, what: str, total: int | None, unit: str) -> tqdm[Any]:
    """Return the same bar for loops that count by calling `update`."""
    nothing: tuple[Any, ...] = ()
    return progress(nothing, what=what, unit=unit, total=total)


class StopRequest:
    """A flag that the first Ctrl-C (or SIGTERM) sets, so that a step can finish and be saved.

    A second Ctrl-C interrupts immediately. Outside the main thread this class does nothing.
    """

    requested = False

    def __enter__(self) -> Self:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        say("stopping after this step; Ctrl-C again stops at once")


def say(message: str) -> None:
    """Print a line for the user above any progress bar; with several ranks only rank 0 prints."""
    if not is_first_rank():
        return
    tqdm.write(printable(message), file=sys.stdout)
    sys.stdout.flush()


def announce(stage: str, work: str, seconds: float | None = None) -> None:
    """Print what a stage is about to do and, if known, about how long it will take.

    Args:
        seconds: an estimate, from a part of the work timed on this machine (`seconds_of`).
    """
    how_long = "" if seconds is None else f", about {readable_seconds(seconds)} on this machine"
    say(f"{stage}: {work}{how_long}")


def readable_bytes(count: float) -> str:
    """Format a number of bytes in powers of ten: 1.5e9 -> "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000.0
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"


def readable_seconds(seconds: float) -> str:
    """Format seconds in the largest unit of which there is at least one: 5400 -> "1.5 h"."""
    for size, unit in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10.0 else f"{seconds:.0f} s"
