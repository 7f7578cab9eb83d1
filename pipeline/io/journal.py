"""A file of JSON lines that grows during the work and records what the lines depend on.

The first line is the fingerprint: {"fingerprint": {...}}. Further lines are appended and synced
before they count. A process that is killed while writing leaves an incomplete last line, which the
next process drops. A damaged line before the last is an error, because that cannot be the cause.
While a process has the file open, no other may open it (flock), since their lines would mix.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pipeline.errors import DecantError, MismatchError, shortened
from pipeline.io.files import make_folder


class Journal:
    """An open journal: `lines` holds its lines, `append` adds to them and to the file.

    Use it in a `with` block, which closes the file.

    Args:
        file: created with its folder if absent.
        fingerprint: what the lines depend on, as JSON holds it.
        key: the parameter that holds the folder, for errors.
        overwrite: discard lines with another fingerprint instead of refusing them.

    Raises:
        MismatchError: the file has another fingerprint; the message names the first difference.
        DecantError: it is damaged, or another process has it open.
    """

    def __init__(
        self, file: Path, fingerprint: dict[str, Any], *, key: str, overwrite: bool
    ) -> None:
        self.file = file
        self._key = key
        self.lines: list[dict[str, Any]] = []
        make_folder(file.parent)
        self._stream = file.open("ab")
        try:
            self._open(fingerprint, overwrite=overwrite)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def _open(self, fingerprint: dict[str, Any], *, overwrite: bool) -> None:
        file = self.file
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DecantError(
                f"{file} is being written by another process: wait until it has ended, or set "
                f"{self._key} to another folder"
            ) from None
        found, kept = _read(file)
        if found and found[0].get("fingerprint") != fingerprint:
            if not overwrite:
                self._refuse(found[0].get("fingerprint"), fingerprint)
            found = []
        self._stream.truncate(kept if found else 0)
        if not found:
            self._write([{"fingerprint": fingerprint}])
        self.lines = found[1:]

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines; they are on the disk when this returns."""
        new = list(lines)
        self._write(new)
        self.lines += new

    def _refuse(self, found: Any, wanted: dict[str, Any]) -> None:
        found = found if isinstance(found, dict) else {}
        names = [n for n in {**wanted, **found} if found.get(n) != wanted.get(n)]
        first = names[0] if names else "fingerprint"
        raise MismatchError(
            f"{self.file} was made with {first}={shortened(found.get(first))}, not "
            f"{shortened(wanted.get(first))}: run with "
            f"--overwrite to start again, or set {self._key} to another folder"
        )

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._stream.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _read(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the complete lines of a file, and the number of bytes they take."""
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            raise DecantError(
                f"{file} line {number} is damaged: remove the file, or the line, and run again"
            )
        lines.append(line)
    return lines, len(whole)
