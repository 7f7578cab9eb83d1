"""Durable files: complete under their name, or not there at all.

Everything a stage leaves behind is written beside its place, synced, and renamed, so that a crash
or a full disk never leaves something half-written that could be taken for whole.
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
    """Wait until a file's data, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(file: Path, data: bytes) -> None:
    """Write a file atomically and durably; its folder is made if need be."""
    with _written_beside(file, data) as partial:
        partial.replace(file)
    fsync(file.parent)


def create_bytes(file: Path, data: bytes) -> bool:
    """`write_bytes`, unless the file exists: of several who try at once, one gets True."""
    with _written_beside(file, data) as partial:
        try:
            _link(partial, file)  # unlike rename, fails where the name is taken
        except FileExistsError:
            return False
    fsync(file.parent)
    return True


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably: a new name is on the disk before it is used."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def write_text(file: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(file, text.encode())


def write_json(file: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def open_file(file: Path) -> BinaryIO:
    """Open a file to read bytes; of a pipe or a device, from which reading may never end, refuse.

    Raises:
        DecantError: it is something else than a file.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        if is_folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        raise DecantError(f"{file} is no file but a pipe or a device: remove it")
    return os.fdopen(descriptor, "rb")


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file, for whoever does without.

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
            f"{file} is damaged ({reason}): put back a copy, or make it again by the stage that "
            "writes it"
        ) from None
    if not isinstance(content, dict):
        raise DecantError(f"{file} holds no JSON object: make it again by the stage that writes it")
    return content


@contextmanager
def _written_beside(file: Path, data: bytes) -> Iterator[Path]:
    """The data, synced, in a file beside `file`; gone after the block unless moved.

    It has a name of its own, since two processes may write the same file at once.
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
    """A hard link; on file systems without them a copy, which readers may see half-written."""
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
