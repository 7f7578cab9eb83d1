"""Hashes of files that may be large; a file is read again only when it has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import DecantError
from pipeline.io.files import read_json_object, write_json

SEEN_TEACHER, SEEN_TEXT = ".seen-teacher.json", ".seen-text.json"
"""Files in paths.inputs that record the sources' sizes, modification times and hashes.

`inputs` shares them with `fetch` and `corpus`, so that under DVC each file is hashed once.
"""


def hash_file(file: Path) -> str:
    """Return a file's sha256 in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_changed(files: Iterable[Path], seen: Path | None) -> dict[str, str]:
    """Return the sha256 of each file, by its path.

    Args:
        seen: file that records the last results, and is updated. A file with the same size, times
            and inode is not read again, as in git. None reads all files.
    """
    before = _recorded(seen)
    now: dict[str, list[object]] = {}
    for file in files:
        about = file.stat()
        as_it_is = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
        known = before.get(str(file))
        if isinstance(known, list) and len(known) == 5 and known[:4] == as_it_is:
            now[str(file)] = known
        else:
            now[str(file)] = [*as_it_is, hash_file(file)]
    if seen and now != before:
        write_json(seen, now)
    return {name: str(found[4]) for name, found in now.items()}


def require_sha256(file: Path, found: str, pinned: str | None) -> None:
    """Refuse a file whose sha256 is not the pinned one; None pins nothing.

    Raises:
        DecantError: it is another file or damaged.
    """
    if pinned not in (None, found):
        raise DecantError(
            f"{file.name} has sha256 {found}, pinned is {pinned}: it is another file or damaged"
        )


def _recorded(seen: Path | None) -> dict[str, Any]:
    """Read the record; a damaged one only costs reading the files again."""
    try:
        return read_json_object(seen) if seen else {}
    except DecantError:
        return {}
