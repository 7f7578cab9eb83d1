"""Allow one process at a time in a folder, by a lock beside it that ends with the process.

The lock is a flock on the file `.NAME.lock`. The file lies beside the folder, not in it, since a
folder that DVC tracks must not contain a process number. The operating system releases the lock
however the process ends, so a file left by a killed process blocks nobody. On Linux, flock also
works over NFS; if a file system has no locks, the work continues without one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.errors import DecantError
from pipeline.io.files import make_folder

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_TRIES, _PAUSE = 20, 0.05  # for parts that start together: one has the lock alone for a moment
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def lock_folder(folder: Path, remedy: str, *, part: int = 1, parts: int = 1) -> Iterator[None]:
    """Lock a folder, which need not exist yet, while the block runs.

    Args:
        remedy: what the user of a second process can do besides waiting.
        part, parts: the process is one of several that fill the folder together. A process with
            the same part, or with a different number of parts, is refused.

    Raises:
        DecantError: another process holds the lock; the message names it.
    """
    folder = folder.resolve()  # for a link, lock the folder that it points to
    with ExitStack() as stack:
        if parts > 1:
            about = f"as a part of {parts}"
            stack.enter_context(_hold(folder, "", about, remedy, shared=True))
            stack.enter_context(_hold(folder, f".{part}-of-{parts}", about, remedy))
        else:
            stack.enter_context(_hold(folder, "", "", remedy))
        yield


@contextmanager
def _hold(
    folder: Path, suffix: str, about: str, remedy: str, *, shared: bool = False
) -> Iterator[None]:
    file = folder.with_name(f".{folder.name}{suffix}.lock")
    try:
        make_folder(file.parent)
        descriptor, alone = _lock(file, shared=shared)
    except BlockingIOError:
        raise DecantError(_refusal(folder, _said(file), remedy)) from None
    except OSError as error:
        if error.errno not in (*_NO_LOCKS, *_NOT_WRITABLE):
            raise
        yield  # the code in the block gives a better message about what cannot be written
        return
    try:
        if alone:
            me = f"process {os.getpid()} on {socket.gethostname()}"
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{me}\n{about}".encode(), 0)
            if shared:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        elif (found := _said(file))[1] != about:
            raise DecantError(_refusal(folder, found, remedy))
        yield
    finally:
        _release(file, descriptor)


def _lock(file: Path, *, shared: bool) -> tuple[int, bool]:
    """Open and lock a file; return its descriptor, and whether no other process holds the lock.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    tries = _TRIES if shared else 1
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with ExitStack() as stack:
            stack.callback(os.close, descriptor)
            alone = _try(descriptor, fcntl.LOCK_EX)
            if alone or (shared and _try(descriptor, fcntl.LOCK_SH)):
                if _is_at(file, descriptor):
                    stack.pop_all()
                    return descriptor, alone
                continue  # the process that held it has removed it meanwhile
        tries -= 1
        if not tries:
            raise BlockingIOError
        time.sleep(_PAUSE)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _release(file: Path, descriptor: int) -> None:
    """Remove the file if nobody else holds it, so that no stale file stays; then release it."""
    with suppress(OSError):
        if _try(descriptor, fcntl.LOCK_EX) and _is_at(file, descriptor):
            file.unlink()
    os.close(descriptor)


def _said(file: Path) -> tuple[str, str]:
    """Return the process that holds a lock, and the part it works on."""
    try:
        who, _, about = file.read_text(errors="replace").partition("\n")
    except OSError:
        who, about = "", ""
    return who or "another process", about


def _refusal(folder: Path, found: tuple[str, str], remedy: str) -> str:
    who = " ".join(filter(None, found))
    return f"{folder} is being written by {who}: wait until it has ended, or {remedy}"
