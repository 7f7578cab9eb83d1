"""The inside of `sandbox.py`: a script that sets up the isolation and runs one program in it.

It is started as `python -I -S -B jail.py` and uses only the standard library, so that none of our
code, threads or open files is near the program. The request comes on stdin: a line of JSON, then
the program. The program's output goes to stderr, the result to stdout, as JSON. When stdin ends,
which also happens when the requesting process is killed, everything is killed.

    supervisor (this process) -- first process of the PID namespace -- the program -- its children

The program is not the first process itself, because the kernel protects that one from signals. When
the first process ends, the kernel kills all others in its namespace, whatever sessions and groups
they moved to; the supervisor's `waitpid` returns once they are gone.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

_NEW_NS, _NEW_UTS, _NEW_IPC = 0x00020000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000  # mount(2)
_READ_ONLY, _NO_SUID, _NO_DEVICES = 1, 2, 4  # mount_setattr(2)
_AT_FDCWD, _AT_RECURSIVE, _DETACH = -100, 0x8000, 2
_PDEATHSIG, _SECCOMP, _FILTER, _NO_NEW_PRIVS = 1, 22, 2, 38  # prctl(2)

_UID = 1000  # the program's uid inside the namespace
_NOBODY = 65534  # its uid outside if root starts it: RLIMIT_NPROC does not bind uid 0

_MOUNT_SETATTR, _CLONE3 = 442, 435  # the same on all architectures
_MACHINES: dict[str, dict[str, Any]] = {
    "x86_64": {
        "arch": 0xC000003E,
        "pivot_root": 155,
        "clone": 56,
        # unshare setns mount umount2 pivot_root chroot ptrace bpf userfaultfd perf_event_open
        # keyctl add_key request_key memfd_create shmget msgget semget mq_open socket setsockopt
        # splice tee vmsplice: pages in pipes do not count as address space
        "denied": "272 308 165 166 155 161 101 321 323 298 250 248 249 319 29 68 64 240 41 54 "
        "275 276 278",
    },
    "aarch64": {
        "arch": 0xC00000B7,
        "pivot_root": 41,
        "clone": 220,
        "denied": "97 268 40 39 41 51 117 280 282 241 219 217 218 279 194 186 190 180 198 208 "
        "75 76 77",
    },
}
# io_uring_setup open_tree move_mount fsopen fsmount fspick mount_setattr memfd_secret
_DENIED_EVERYWHERE = "425 428 429 430 432 433 442 447"

_RUNNER = """
import os, sys
word = int(sys.argv.pop())
try:
    with open("program.py", encoding="utf-8") as stream:
        source = stream.read()
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
except MemoryError:
    os.write(word, b"out of memory")
    raise
os.write(word, b"passed")
"""

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read the request, set up the isolation, run the program, and report how it ended."""
    request = json.loads(sys.stdin.buffer.readline())
    program = sys.stdin.buffer.read(request["bytes"])
    processes = None
    try:
        if request["isolated"]:
            _enter_namespaces()
            _build_root(request["readable"], request["disk"])
            # The first process counts too, and so does this one if both have the same user.
            processes = request["processes"] + (1 if os.getuid() == 0 else 2)
        result = _supervise(request, program, processes)
    except OSError as error:
        result = _told(error)
    os.write(1, result)


def _told(error: Exception) -> bytes:
    if isinstance(error, OSError):
        return json.dumps({"error": f"{error.filename or 'start'}: {error.strerror}"}).encode()
    return json.dumps({"error": repr(error)[:500]}).encode()


def _supervise(request: dict[str, Any], program: bytes, processes: int | None) -> bytes:
    """Return the first process's result, or why there is none; no process is left on return."""
    reading, writing = os.pipe()
    first = os.fork()
    if first == 0:
        try:
            os.write(writing, _first_process(request, program, processes))
        except Exception as error:
            os.write(writing, _told(error))
        finally:
            os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([0, reading], [], [], request["seconds"])
    if reading in ready:
        result = os.read(reading, 4096) or b'{"word": "stopped"}'
    else:
        result = b'{"word": "stopped"}' if ready else b'{"word": "timed out"}'
    for kill in (os.killpg, os.kill):  # it may not have created its group yet
        with suppress(ProcessLookupError):
            kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    return result


def _first_process(request: dict[str, Any], program: bytes, processes: int | None) -> bytes:
    """Start the program, wait for it, and report how it ended."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if request["isolated"]:
        _become_nobody()
        _prctl(_PDEATHSIG, signal.SIGKILL)
    Path("program.py").write_bytes(program)
    word, word_end = os.pipe()
    trouble, trouble_end = os.pipe()  # closed by exec: only errors before it come through
    child = os.fork()
    if child == 0:
        try:
            _run(request, processes, word_end)
        except Exception as error:
            os.write(trouble_end, _told(error))
        finally:
            os._exit(127)
    os.close(word_end)
    os.close(trouble_end)
    if told := os.read(trouble, 4096):
        return told
    _, status = os.waitpid(child, 0)
    os.set_blocking(word, False)  # the program's children may still hold the other end
    said = b""
    with suppress(BlockingIOError):
        said = os.read(word, 64)
    code = os.waitstatus_to_exitcode(status)
    return json.dumps({"code": code, "word": said.decode("ascii", "replace")}).encode()


def _run(request: dict[str, Any], processes: int | None, word: int) -> NoReturn:
    """Become the program, with its limits applied."""
    os.dup2(2, 1)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.set_inheritable(word, True)
    _limit(resource.RLIMIT_CPU, math.ceil(request["seconds"]) + 1)
    _limit(resource.RLIMIT_AS, request["memory"])
    _limit(resource.RLIMIT_FSIZE, request["disk"])
    _limit(resource.RLIMIT_NOFILE, 64)
    _limit(resource.RLIMIT_CORE, 0)
    if processes is not None:
        _limit(resource.RLIMIT_NPROC, processes)
    if request["isolated"]:
        _prctl(_NO_NEW_PRIVS, 1)
        _filter_system_calls()
    command = [request["python"], "-I", "-S", "-B", "-c", _RUNNER, str(word)]
    home = str(Path.cwd())
    variables = {"HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    os.execve(command[0], command, variables)


def _limit(which: int, most: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(which, (most, most))


def _enter_namespaces() -> None:
    """Enter new namespaces for users, mounts, processes, network, message queues and host name.

    A child that stays outside maps the ids. Root maps two: itself, to bind folders that only root
    may enter, and nobody, for the program.
    """
    here, user, group = os.getpid(), os.geteuid(), os.getegid()
    reading, writing = os.pipe()
    mapper = os.fork()
    if mapper == 0:
        os.close(writing)
        if os.read(reading, 1):
            with suppress(OSError):
                _map_ids(here, user, group)
                os._exit(0)
        os._exit(1)
    os.close(reading)
    everything = _NEW_USER | _NEW_NS | _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_UTS
    _check(_libc.unshare(everything), "unshare (user namespaces)")
    os.write(writing, b"x")
    _, status = os.waitpid(mapper, 0)
    if status:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), "mapping of user ids")


def _map_ids(pid: int, user: int, group: int) -> None:
    process = Path("/proc", str(pid))
    if user == 0:
        both = f"0 0 1\n{_UID} {_NOBODY} 1\n"
        with suppress(PermissionError):  # in a container without such a user
            (process / "uid_map").write_text(both)
            (process / "gid_map").write_text(both)
            return
    (process / "setgroups").write_text("deny")
    (process / "uid_map").write_text(f"{_UID} {user} 1\n")
    (process / "gid_map").write_text(f"{_UID} {group} 1\n")


def _become_nobody() -> None:
    if os.getuid() == 0:
        os.setgroups([])
    os.setresgid(_UID, _UID, _UID)
    os.setresuid(_UID, _UID, _UID)


def _build_root(readable: list[str], disk: int) -> None:
    """Build a new root: what Python needs, read-only, and a /tmp in memory; no /proc.

    The old root stays at /old until everything has been bound from there.
    """
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.chdir("/tmp")
    Path("old").mkdir()
    number = _machine()["pivot_root"]
    _check(_libc.syscall(ctypes.c_long(number), b".", b"old"), "pivot_root")
    os.chdir("/")
    for path in (*readable, "/dev/null", "/dev/zero", "/dev/urandom"):
        _bind(Path(path))
    Path("/tmp").mkdir(exist_ok=True)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, f"size={disk},nr_inodes=4096,mode=777")
    _check(_libc.umount2(b"/old", _DETACH), "umount2 /old")
    Path("/old").rmdir()
    _restrict("/", _READ_ONLY | _NO_SUID | _NO_DEVICES, 0)
    os.chdir("/tmp")


def _bind(path: Path) -> None:
    """Bind the outside's `path`, with everything mounted below it, read-only."""
    source = Path("/old", path.relative_to("/"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        path.symlink_to(source.readlink())
        return
    if source.is_dir():
        path.mkdir(exist_ok=True)
    else:
        path.touch()
    _mount(str(source), str(path), None, _BIND | _REC)
    devices = 0 if path.parent == Path("/dev") else _NO_DEVICES
    _restrict(str(path), _READ_ONLY | _NO_SUID | devices, _AT_RECURSIVE)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    code = _libc.mount(*words, ctypes.c_ulong(flags), data.encode() or None)
    _check(code, f"mount {target}")


def _restrict(path: str, attributes: int, flags: int) -> None:
    """Add attributes to a mount; unlike a remount, this does not remove locked ones."""
    what = struct.pack("4Q", attributes, 0, 0, 0)
    number, here = ctypes.c_long(_MOUNT_SETATTR), ctypes.c_long(_AT_FDCWD)
    size = ctypes.c_size_t(len(what))
    code = _libc.syscall(number, here, path.encode(), ctypes.c_long(flags), what, size)
    _check(code, f"mount_setattr {path}")


def _filter_system_calls() -> None:
    """Refuse system calls that would circumvent the limits (seccomp, with a list of denied calls).

    New namespaces could mount a larger tmpfs. memfd, System V memory, message queues and sockets
    with large buffers hold memory that RLIMIT_AS does not count. Keyrings belong to the user.
    Sockets of some families (vsock, to a virtual machine's host) ignore network namespaces. Pairs
    of sockets are allowed, because asyncio needs one. The rest is known for its bugs.
    """
    machine = _machine()
    allow, refuse, absent, kill = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 1 << 31
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, machine["arch"]), (answer, 0, 0, kill)]
    code += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse)]  # x32's numbers
    for number in f"{machine['denied']} {_DENIED_EVERYWHERE}".split():
        code += [(equal, 0, 1, int(number)), (answer, 0, 0, refuse)]
    code += [(equal, 0, 1, _CLONE3), (answer, 0, 0, absent)]  # a filter cannot read its flags
    code += [(equal, 0, 3, machine["clone"]), (load, 0, 0, 16)]
    code += [(any_bit, 0, 1, _NEW_USER), (answer, 0, 0, refuse), (answer, 0, 0, allow)]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = struct.pack("@HP", len(code), ctypes.addressof(packed))
    _prctl(_SECCOMP, _FILTER, program)


def _machine() -> dict[str, Any]:
    name = platform.machine()
    if name not in _MACHINES:
        raise OSError(errno.ENOSYS, f"the sandbox knows {' and '.join(_MACHINES)}", name)
    return _MACHINES[name]


def _prctl(option: int, *values: Any) -> None:
    words = [value if isinstance(value, bytes) else ctypes.c_ulong(value) for value in values]
    words += [ctypes.c_ulong(0)] * (4 - len(words))
    _check(_libc.prctl(option, *words), f"prctl {option}")


def _check(code: int, what: str) -> None:
    if code < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    main()
