"""Messages, progress bars and Ctrl-C. PyTorch is not imported here."""

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
    """Iterate with a progress bar: rate and time left; on a log file a line every ten seconds.

    Only rank 0 shows it.
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
    """The same bar for loops that count by `update`."""
    nothing: tuple[Any, ...] = ()
    return progress(nothing, what=what, unit=unit, total=total)


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a flag, so that a step can end and be saved.

    A second Ctrl-C interrupts at once. Outside the main thread it does nothing.
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
    """Print a line for the user above any progress bar; of several ranks only the first does."""
    if not is_first_rank():
        return
    tqdm.write(printable(message), file=sys.stdout)
    sys.stdout.flush()


def announce(stage: str, work: str, seconds: float | None = None) -> None:
    """Say what a stage is about to do and, where it was measured, about how long it takes.

    Args:
        seconds: an estimate from a piece of the work timed on this machine (`seconds_of`).
    """
    how_long = "" if seconds is None else f", about {readable_seconds(seconds)} on this machine"
    say(f"{stage}: {work}{how_long}")


def readable_bytes(count: float) -> str:
    """1.5e9 -> "1.5 GB"; powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000.0
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"


def readable_seconds(seconds: float) -> str:
    """5400 -> "1.5 h"; in the largest unit that leaves at least one."""
    for size, unit in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10.0 else f"{seconds:.0f} s"
