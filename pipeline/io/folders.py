"""Folders on a disk, in an object store or on the hub, with one small interface.

Corpus, cache and checkpoints may be stored at a path, at s3://bucket/prefix or at
gs://bucket/prefix; corpus and cache may also be read from hf://datasets/ORG/NAME. They need little
from storage: reading and writing whole objects at once, atomically; a listing with sizes; creation
that only one of several writers wins.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Protocol

from pipeline.io.address import Address, HubUrl, Url
from pipeline.io.files import create_bytes, open_file, write_bytes
from pipeline.io.hub_folder import HubFolder
from pipeline.io.object_store import ObjectFolder


class Folder(Protocol):
    """The interface of a storage folder; keys are relative and use slashes."""

    def read(self, key: str) -> bytes:
        """Return the whole object. Raises FileNotFoundError if there is none."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Replace the object atomically: readers see the old or the new one, never a part."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write the object unless it exists; if several callers try at once, one gets True."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the keys below a prefix (a folder's name), with their sizes in bytes."""
        ...

    def remove(self, prefix: str = "") -> None:
        """Delete the object `prefix`, or everything below it; it need not exist."""
        ...


def open_folder(address: Address) -> Folder:
    """Return the folder at an address; it need not exist."""
    if isinstance(address, HubUrl):
        return HubFolder(address)
    return ObjectFolder(address) if isinstance(address, Url) else LocalFolder(address)


class LocalFolder:
    """A folder on a disk (or a shared file system); writes are fsynced."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, key: str) -> bytes:
        with open_file(self._path / key) as stream:
            return stream.read()

    def write(self, key: str, data: bytes) -> None:
        write_bytes(self._path / key, data)

    def create(self, key: str, data: bytes) -> bool:
        return create_bytes(self._path / key, data)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        for folder, inner, names in os.walk(self._path / prefix):  # skips folders that vanish
            inner[:] = [name for name in inner if not name.endswith(".partial")]
            for name in names:
                file = Path(folder, name)
                if file.suffix == ".partial":
                    continue
                try:
                    found[file.relative_to(self._path).as_posix()] = file.stat().st_size
                except FileNotFoundError:
                    continue  # another process removed it meanwhile
        return found

    def remove(self, prefix: str = "") -> None:
        target = self._path / prefix
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
