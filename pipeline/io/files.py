"""Durable files: complete under their final name, or not there at all.

Every file that a stage writes is first written beside its final place, synced, and then renamed, so
that a crash or a full disk never leaves a half-written file that could be taken for a complete one.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import DecantError


def fsync(path: Path) -> None:
    """Wait until a file's data, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(file: Path, data: bytes) -> None:
    """Write a file atomically and durably; create its folder if necessary."""
    with _written_beside(file, data) as partial:
        partial.replace(file)
    fsync(file.parent)


def create_bytes(file: Path, data: bytes) -> bool:
    """Write like `write_bytes`, unless the file exists; if several try at once, one gets True."""
    with _written_beside(file, data) as partial:
        try:
            _link(partial, file)  # unlike rename, this fails if the name is taken
        except FileExistsError:
            return False
    fsync(file.parent)
    return True


def make_folder(folder: Path) -> None:
    """Create a folder and its parents durably: each name is on disk before it is used."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def write_text(file: Path, text: str) -> None:
    """Write text as UTF-8, as `write_bytes` does."""
    write_bytes(file, text.encode())


def write_json(file: Path, content: Any) -> None:
    """Write content as indented JSON, as `write_text` does."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def open_file(file: Path) -> BinaryIO:
    """Open a file for reading bytes; refuse a pipe or a device, as reading it may never end.

    Raises:
        DecantError: the path is not a regular file.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        if is_folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        raise DecantError(f"{file} is a pipe or a device, not a file: remove it")
    return os.fdopen(descriptor, "rb")


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is not a file, for callers that can do without.

    Raises:
        DecantError: the file is damaged.
    """
    try:
        with open_file(file) as stream:
            content = json.loads(stream.read())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except DecantError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not file.stat().st_size else str(error)[:100]
        raise DecantError(
            f"{file} is damaged ({reason}): restore a copy, or make it again by the stage that "
            "writes it"
        ) from None
    if not isinstance(content, dict):
        raise DecantError(f"{file} holds no JSON object: make it again by the stage that writes it")
    return content


@contextmanager
def _written_beside(file: Path, data: bytes) -> Iterator[Path]:
    """Yield a synced file with the data, beside `file`; it is removed at the end unless moved.

    It has a unique name, since two processes may write the same file at once.
    """
    make_folder(file.parent)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Make a hard link; where the file system has none, a copy, which readers may see partial."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        with target.open("xb") as stream:
            stream.write(source.read_bytes())
            stream.flush()
            os.fsync(stream.fileno())
