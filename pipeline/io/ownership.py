"""Marks by which Decant knows its own folders, so that no stage removes or replaces another's.

A folder that a stage writes at once, such as a model, also lists its files with checksums in its
mark; it takes its final name only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import xxhash

from pipeline.errors import DecantError, MismatchError, accident, is_full, place_of
from pipeline.io.address import Address, Url
from pipeline.io.files import fsync, open_file, write_bytes
from pipeline.io.folders import Folder, open_folder
from pipeline.io.locks import lock_folder

MARK = ".decant.json"
"""The file that marks a folder as Decant's own; no stage removes anything from other folders."""


def claim(address: Address, kind: str, *, key: str) -> None:
    """Mark a folder as Decant's, unless it is already marked; see `require_ours`.

    The mark says what the folder holds; `lock` says which process is writing it.
    """
    if not require_ours(address, kind, key=key):
        open_folder(address).write(MARK, json.dumps({"kind": kind}).encode())


def require_ours(address: Address, kind: str, *, key: str) -> bool:
    """Return whether a folder is marked as the kind a stage will write; False if it is empty.

    Args:
        kind: the kind of folder that the stage writes, for example "corpus".
        key: the parameter that holds the address, for the error.

    Raises:
        MismatchError: the folder holds anything else, which no stage may remove or overwrite.
    """
    folder = open_folder(address)
    found = _read_mark(folder)
    if found is None and (present := _names(address)):
        if MARK not in present:
            raise MismatchError(
                f"{address} holds files, for example {present[0]}, but no mark of Decant's "
                f"({MARK}), so it is left as it is: set {key} to another place or remove it"
            )
        found = _read_mark(folder)  # another process has just written it
    if found is None or found == kind:
        return found == kind
    raise MismatchError(
        f"{address} holds other output of Decant's ({found or 'its mark is damaged'}), "
        f"not {kind}: set {key} to another place, or remove it yourself"
    )


def lock(
    address: Address, remedy: str, *, part: int = 1, parts: int = 1
) -> AbstractContextManager[None]:
    """Keep other processes from writing at an address while a block runs (pipeline/io/locks.py).

    This applies to folders on a disk. In an object store nothing is locked, so two writers of one
    corpus, cache or run are not refused. The result is safe nevertheless: each object is replaced
    as a whole, only one of them creates a group's zarr.json, and a mixture of their shards does not
    match the checksums in it, so it is refused when it is read and never used.

    Args:
        remedy, part, parts: see `lock_folder`.
    """
    if isinstance(address, Url):
        return nullcontext()
    return lock_folder(address, remedy, part=part, parts=parts)


def find_damage(folder: Path) -> str:
    """Describe the first file that is not as `atomic_folder` left it; empty if there is none.

    For a folder without a mark, or with a mark that lists no files, there is nothing to compare.
    """
    try:
        with open_file(folder / MARK) as stream:
            mark = json.loads(stream.read())
        listed = mark.get("files", {}) if isinstance(mark, dict) else None
        entries = sorted(listed.items())  # type: ignore[union-attr]
    except FileNotFoundError:
        return ""
    except (ValueError, AttributeError, RecursionError):
        return f"{MARK} cannot be read"
    for name, entry in entries:
        try:
            found = _sum(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except DecantError:
            return f"{name} is not a file"
        if found != entry:
            return f"{name}, {found[0]:,} bytes, does not match its checksum"
    return ""


def _sum(file: Path) -> list[Any]:
    """Return a file's size in bytes and its xxh3 (128 bits, hexadecimal)."""
    digest, length = xxhash.xxh3_128(), 0
    with open_file(file) as stream:
        while block := stream.read(2**20):
            digest.update(block)
            length += len(block)
    return [length, digest.hexdigest()]


def _read_mark(folder: Folder) -> str | None:
    """Return the kind in a folder's mark; empty if the mark is damaged, None if there is none."""
    try:
        return str(json.loads(folder.read(MARK))["kind"])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def _names(address: Address) -> list[str]:
    """List what an address holds; on a disk all entries, links and empty folders included."""
    if isinstance(address, Url):
        return sorted(open_folder(address).sizes())
    if not address.is_dir():
        return []
    names = (entry.name for entry in address.iterdir())
    return sorted(name for name in names if not name.startswith(f".{MARK}"))  # being written


@contextmanager
def atomic_folder(folder: Path, kind: str, *, key: str) -> Iterator[Path]:
    """Yield a new folder that takes its final name only if the block succeeds.

    It then replaces an existing folder of that name. Its mark lists every file with its checksum,
    for `find_damage`. A link to a folder is followed: the folder that it points to is replaced.

    Args:
        kind, key: see `require_ours`; only a folder with the mark is replaced.

    Raises:
        MismatchError: something else is there; the block does not run.
        DecantError: another process is writing the folder, or the disk is full.
    """
    folder = folder.resolve()
    partial = folder.with_name(folder.name + ".partial")
    require_ours(folder, kind, key=key)
    with lock_folder(folder, f"set {key} to another place"):
        if partial.exists():
            require_ours(partial, kind, key=key)
            shutil.rmtree(partial)
        try:
            partial.mkdir(parents=True)
            claim(partial, kind, key=key)
            yield partial
            _finish(partial, kind)
            if folder.exists():
                require_ours(folder, kind, key=key)  # again, since the block may take an hour
                shutil.rmtree(folder)
            partial.rename(folder)
            fsync(folder.parent)
        except BaseException as error:
            written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
            shutil.rmtree(partial, ignore_errors=True)
            if is_full(error):
                raise DecantError(
                    f"{folder} could not be written: at {place_of(error) or partial}, "
                    f"{accident(error)} (the {written / 1e6:,.0f} MB written are removed again): "
                    "free more than that, then run the same command"
                ) from error
            raise


def _finish(partial: Path, kind: str) -> None:
    """List all files in the mark, and wait until they are on disk."""
    files = sorted(file for file in partial.rglob("*") if file.is_file() and file.name != MARK)
    sums = {file.relative_to(partial).as_posix(): _sum(file) for file in files}
    write_bytes(partial / MARK, json.dumps({"kind": kind, "files": sums}, indent=1).encode())
    for file in (*files, partial):
        fsync(file)
