"""Folders on a disk or in an object store, with one small interface.

Corpus, cache and checkpoints may be stored at a path, at s3://bucket/prefix or at
gs://bucket/prefix. They need little from either kind of storage: reading and writing whole objects
at once, atomically; a listing with sizes; creation that only one of several writers wins. Object
stores are accessed through obstore (the extra `objects`), which takes credentials and endpoints
from the environment as the vendors' own tools do (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, ...).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import xxhash

from pipeline.errors import DecantError, MismatchError, accident, is_full, place_of, reason_of
from pipeline.io.files import create_bytes, fsync, open_file, write_bytes
from pipeline.io.locks import lock_folder
from pipeline.runtime.optional import require

Result = TypeVar("Result")

MARK = ".decant.json"
"""The file that marks a folder as Decant's own; no stage removes anything from other folders."""

_SCHEMES = ("s3", "gs")
_TRIES = 6
_FIRST_PAUSE = 0.5  # seconds; doubled after each try, with jitter
_CLIENT = {
    "timeout": timedelta(seconds=60),  # per request with its body; a shard has a few megabytes
    "connect_timeout": timedelta(seconds=10),
    "allow_http": True,  # for endpoints given as http; the vendors' own use https
}
_RETRIES = {
    "max_retries": 6,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {
        "base": 2,
        "init_backoff": timedelta(seconds=_FIRST_PAUSE),
        "max_backoff": timedelta(seconds=15),
    },
}


class Url(str):
    """Address of a prefix in an object store, without a trailing slash."""

    __slots__ = ()

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self}/{name}")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.rpartition("/")[2]


Address = Path | Url
"""A path, or a prefix in an object store."""


def parse_address(value: object) -> Address:
    """Convert a value to a Path, or to a Url if it has a scheme.

    Raises:
        ValueError: the scheme is neither s3 nor gs, or there is no bucket.
    """
    text = str(value)
    scheme, has_scheme, _ = text.partition("://")
    if not has_scheme:
        return Path(text)
    if scheme not in _SCHEMES:
        raise ValueError(f"the scheme {scheme}:// is not known: use a path, s3:// or gs://")
    if not text.partition("://")[2].strip("/"):
        raise ValueError(f"{text} names no bucket: write {scheme}://bucket/prefix")
    return Url(text.rstrip("/"))


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
    return ObjectFolder(address) if isinstance(address, Url) else LocalFolder(address)


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


class ObjectFolder:
    """A prefix in an object store; failed and stalled requests are retried with back-off.

    obstore retries requests that the server refuses (5xx, throttling). Requests that stall, or fail
    while their body is being transferred, are retried here.
    """

    def __init__(self, url: Url) -> None:
        obstore = require("obstore", "objects", str(url))
        from obstore.store import from_url

        self._url = url
        self._obstore = obstore
        try:
            self._store: Any = from_url(url, client_options=_CLIENT, retry_config=_RETRIES)
        except (obstore.exceptions.BaseError, ValueError) as error:
            reason = reason_of(error)
            raise DecantError(
                f"{url} cannot be opened ({reason}): check the address and the credentials in the "
                "environment"
            ) from None

    def read(self, key: str) -> bytes:
        return bytes(self._try("read", key, lambda: self._obstore.get(self._store, key).bytes()))

    def write(self, key: str, data: bytes) -> None:
        self._try("write", key, lambda: self._obstore.put(self._store, key, data))

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._try(
                "write", key, lambda: self._obstore.put(self._store, key, data, mode="create")
            )
        except (FileExistsError, self._obstore.exceptions.AlreadyExistsError):
            return False
        return True

    def sizes(self, prefix: str = "") -> dict[str, int]:
        def collect() -> dict[str, int]:
            pages = self._obstore.list(self._store, prefix=prefix or None)
            return {meta["path"]: meta["size"] for page in pages for meta in page}

        return self._try("list", prefix, collect)

    def remove(self, prefix: str = "") -> None:
        keys = list(self.sizes(prefix)) or ([prefix] if prefix else [])
        try:
            self._try("remove", prefix, lambda: self._obstore.delete(self._store, keys))
        except FileNotFoundError:
            return

    def _try(self, what: str, key: str, request: Callable[[], Result]) -> Result:
        answers = (  # the server's answers, which a retry would not change
            FileNotFoundError,  # raised by obstore for its NotFoundError
            FileExistsError,
            self._obstore.exceptions.AlreadyExistsError,
        )
        refusals = (
            self._obstore.exceptions.PermissionDeniedError,
            self._obstore.exceptions.UnauthenticatedError,
        )
        for number in range(1, _TRIES + 1):
            try:
                return request()
            except answers:
                raise
            except (self._obstore.exceptions.BaseError, OSError) as error:
                if number == _TRIES or isinstance(error, refusals):
                    reason = reason_of(error)
                    raise DecantError(
                        f"cannot {what} {self._url}/{key}, on attempt {number} ({reason}): check "
                        "the connection, the endpoint and the credentials in the environment"
                    ) from error
                time.sleep(_FIRST_PAUSE * 2 ** (number - 1) * random.uniform(0.5, 1.5))
        raise AssertionError
