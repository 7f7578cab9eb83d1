"""Hashes of files that may be large, read again only when they have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pipeline.files import read_json_object, write_json

SEEN = ".seen.json"
"""Beside what was made of files: their sizes, times of change and hashes. DVC ignores it."""


def hash_file(file: Path) -> str:
    """sha256, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_changed(files: Iterable[Path], seen: Path | None) -> dict[str, str]:
    """sha256 of each file, by its path.

    Args:
        seen: what was found the last time; a file of the same size and time of change is not read
            again, as by DVC and git. It is brought up to date. None: all are read.
    """
    before = read_json_object(seen) if seen else {}
    now: dict[str, list[object]] = {}
    for file in files:
        about = file.stat()
        as_it_is = [about.st_size, about.st_mtime_ns]
        known = before.get(str(file))
        if isinstance(known, list) and len(known) == 3 and known[:2] == as_it_is:
            now[str(file)] = known
        else:
            now[str(file)] = [*as_it_is, hash_file(file)]
    if seen and now != before:
        write_json(seen, now)
    return {name: str(found[2]) for name, found in now.items()}
