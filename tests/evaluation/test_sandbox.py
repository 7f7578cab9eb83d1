"""Hostile programs: what they tried is looked for from outside."""

from __future__ import annotations

import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import DecantError
from pipeline.evaluation import sandbox
from pipeline.evaluation.sandbox import Limits, probe, run_program
from tests.helpers import ROOT

MIB = 2**20
LIMITS = Limits(seconds=1.0, memory=128 * MIB, processes=4, disk=4 * MIB, output=10_000)

_reason = probe()
sandboxed = pytest.mark.skipif(_reason is not None, reason=f"no sandbox here: {_reason}")


def named(name: str, program: str) -> str:
    """The program under a name by which its processes, children included, are found outside."""
    return f"""
import os, sys
command = [sys.executable, "-I", "-S", "-c", {program!r}, {name!r}]
os.execv(sys.executable, command)
"""


def processes(name: str) -> dict[int, int]:
    """Resident bytes of each process of that name, by its number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if name.encode() in (folder / "cmdline").read_bytes():
                found[int(folder.name)] = int((folder / "statm").read_text().split()[1]) * 4096
    found.pop(os.getpid(), None)
    return found


@contextmanager
def watched(name: str) -> Iterator[list[dict[int, int]]]:
    """What `processes` saw, about a hundred times a second, while the block ran."""
    seen: list[dict[int, int]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            seen.append(processes(name))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.fixture
def name() -> str:
    return f"decant-{uuid.uuid4().hex}"


@pytest.mark.parametrize("isolated", [pytest.param(True, marks=sandboxed), False])
@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        ("assert 1 + 1 == 2", "passed", ""),
        ("print('a' * 9999)", "passed", ""),
        ("assert False, 'no'", "failed", "AssertionError: no"),
        ("def f(:", "failed", "SyntaxError"),
        ('"""never closed', "failed", "SyntaxError"),
        ("import numpy", "failed", "ModuleNotFoundError"),
        ("raise SystemExit", "failed", "it left before its end"),
        ("import sys; sys.exit(0)", "failed", "it left before its end"),
        ("import os; os._exit(0)", "failed", "it left before its end"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "failed", "by signal 15"),
        ("import os; os.kill(os.getpid(), 40)", "failed", "by signal 40"),
        ("print('a' * 10000)", "too much output", "more than 10,000 bytes"),
        ("import sys; assert sys.stdin.read() == ''", "passed", ""),
        ("import threading; t = threading.Thread(target=int); t.start(); t.join()", "passed", ""),
        ("open('a', 'w').write('b'); assert open('a').read() == 'b'", "passed", ""),
        ("s = '\\ud800'", "passed", ""),
    ],
)
def test_says_how_a_program_ended(program: str, status: str, detail: str, isolated: bool) -> None:
    outcome = run_program(program, replace(LIMITS, seconds=10.0), isolated=isolated)
    assert (outcome.status, outcome.detail) == (status, outcome.detail)
    assert detail in outcome.detail
    assert len(outcome.output.encode()) <= LIMITS.output


@pytest.mark.parametrize("isolated", [pytest.param(True, marks=sandboxed), False])
@pytest.mark.parametrize("body", ["pass", "try: os.kill(0, 0)\n    except: pass"])
def test_endless_loop_ends_in_time(body: str, isolated: bool) -> None:
    started = time.monotonic()
    outcome = run_program(f"import os\nwhile True:\n    {body}", LIMITS, isolated=isolated)
    assert outcome.status == "timed out"
    assert 0.9 < time.monotonic() - started < 3.0


@sandboxed
@pytest.mark.parametrize(
    "fork", ["os.fork()", "threading.Thread(target=time.sleep, args=(9,)).start()"]
)
def test_fork_bomb_stays_small(fork: str, name: str) -> None:
    bomb = f"import os, threading, time\nwhile True:\n  try: {fork}\n  except Exception: pass"
    with watched(name) as seen:
        outcome = run_program(named(name, bomb), LIMITS)
    assert outcome.status == "timed out"
    assert (2 if "fork" in fork else 1) <= max(map(len, seen)) <= LIMITS.processes
    assert not processes(name)


@sandboxed
def test_memory_bomb_ends_out_of_memory(name: str) -> None:
    bomb = "x = []\nwhile True: x.append(bytearray(1024 * 1024))"
    outcome = run_program(bomb, replace(LIMITS, seconds=10.0))
    assert (outcome.status, outcome.detail) == ("out of memory", "MemoryError")
    family = f"import os\nos.fork(); os.fork()\ntry:\n  {bomb.replace(chr(10), chr(10) + '  ')}\n"
    family += "except MemoryError:\n  import time; time.sleep(9)"
    with watched(name) as seen:
        outcome = run_program(named(name, family), LIMITS)
    assert outcome.status == "timed out"
    largest = max((sum(found.values()) for found in seen), default=0)
    assert 0 < largest < LIMITS.processes * LIMITS.memory
    assert not processes(name)


@sandboxed
@pytest.mark.parametrize(
    "attempt",
    [
        "libc.memfd_create(b'a', 0)",
        "libc.shmget(0, 1 << 30, 0o1600)",
        "libc.unshare(0x10000000)",  # a user namespace, in which tmpfs may be mounted
        "libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, b'size=1g')",
        "libc.syscall(56, 0x10000011, 0, 0, 0, 0)",  # clone into a user namespace
        "libc.syscall(0x40000000 + 272, 0x10000000)",  # unshare by its x32 number
        "libc.ptrace(16, 1, 0, 0)",
        "libc.syscall(250, 1, 0, 0, 0, 0)",  # keyctl
        "libc.setuid(0)",
        "libc.socket(16, 3, 0)",  # netlink
        "libc.socket(40, 1, 0)",  # vsock, which reaches a virtual machine's host
    ],
)
def test_ways_around_the_limits_are_closed(attempt: str) -> None:
    if "syscall" in attempt and platform.machine() != "x86_64":
        pytest.skip("numbers of x86-64")
    program = f"import ctypes\nlibc = ctypes.CDLL(None)\nassert {attempt} == -1"
    outcome = run_program(program, replace(LIMITS, seconds=10.0))
    assert (outcome.status, outcome.detail) == ("passed", "")


@sandboxed
def test_pages_cannot_be_put_into_pipes() -> None:
    """They would stay there when unmapped: 4.9 GB by one program that was limited to 512 MiB."""
    program = """
import ctypes, os
libc = ctypes.CDLL(None)
class Vector(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]
page = ctypes.create_string_buffer(4096)
(reading, writing), (_, another) = os.pipe(), os.pipe()
vector = Vector(ctypes.addressof(page), 4096)
done = [libc.vmsplice(writing, ctypes.byref(vector), 1, 0)]
os.write(writing, b"x")
done += [libc.tee(reading, another, 1, 0), libc.splice(reading, None, another, None, 1, 0)]
print(done)
"""
    outcome = run_program(program, replace(LIMITS, seconds=10.0))
    assert (outcome.status, outcome.output) == ("passed", "[-1, -1, -1]\n")
    assert run_program(program, LIMITS, isolated=False).output == "[4096, 1, 1]\n"  # as it is


@sandboxed
def test_socket_pairs_work_and_hold_little() -> None:
    """Their buffers are the kernel's, which RLIMIT_AS does not count."""
    program = """
import asyncio, socket
asyncio.run(asyncio.sleep(0))
one, other = socket.socketpair()
try:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)
except PermissionError:
    print("refused")
"""
    outcome = run_program(program, replace(LIMITS, seconds=10.0))
    assert (outcome.status, outcome.output) == ("passed", "refused\n")


@sandboxed
def test_nothing_is_written_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    targets = [tmp_path / "new", Path("/new"), Path("/usr/new"), Path(sys.base_prefix, "new")]
    targets += [Path(tempfile.gettempdir(), f"new-{uuid.uuid4().hex}"), ROOT / "new"]
    program = f"""
import os
open(os.path.expanduser("~/mine"), "w").write("x")
for file in {[str(target) for target in targets]}:
    try:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        open(file, "w").write("x")
        print("written", file)
    except OSError:
        pass
"""
    outcome = run_program(program, replace(LIMITS, seconds=10.0))
    assert outcome.status == "passed"
    for line in outcome.output.splitlines():
        assert line.startswith("written /tmp/")  # its own, which is nobody else's
    for target in [*targets, tmp_path / "mine", Path(tempfile.gettempdir(), "mine")]:
        assert not target.exists(), target
    assert run_program("open('/tmp/mine')", LIMITS).detail.startswith("FileNotFoundError")


@sandboxed
def test_home_and_environment_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = uuid.uuid4().hex
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", secret)
    (tmp_path / "token").write_text(secret)
    program = f"""
import glob, os
print(dict(os.environ))
for file in ["~/token", {str(tmp_path / "token")!r}, *glob.glob("/proc/*/environ")]:
    try:
        print(open(os.path.expanduser(file)).read())
    except OSError as error:
        print(error)
print(sorted(os.listdir("/")))
"""
    outcome = run_program(program, replace(LIMITS, seconds=10.0))
    assert outcome.status == "passed"
    assert outcome.output.count("No such file") == 2
    assert secret not in outcome.output
    assert "'proc'" not in outcome.output
    plain = run_program(program, replace(LIMITS, seconds=10.0), isolated=False)
    assert "HF_TOKEN" not in plain.output.splitlines()[0]  # nor without the sandbox


def test_of_pythons_prefix_only_python_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the home itself."""
    for name in ("bin", "lib", ".ssh", "share"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    shown = [path for path in sandbox._readable() if path.startswith(str(tmp_path))]
    assert shown == [str(tmp_path / "bin"), str(tmp_path / "lib")]
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert all(path in sandbox._SYSTEM for path in sandbox._readable())


@sandboxed
def test_no_listener_is_reached(tmp_path: Path) -> None:
    path, abstract = str(tmp_path / "socket"), f"\0decant-{uuid.uuid4().hex}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as file,
        socket.socket(socket.AF_UNIX) as hidden,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as letters,
    ):
        file.bind(path)
        hidden.bind(abstract)
        letters.bind(abstract + "-letters")
        file.listen()
        hidden.listen()
        program = f"""
import socket
for family, address in [
    (socket.AF_INET, {tcp.getsockname()!r}),
    (socket.AF_INET, ("10.0.0.1", 80)),
    (socket.AF_UNIX, {path!r}),
    (socket.AF_UNIX, {abstract!r}),
]:
    try:
        socket.socket(family).connect(address)
        print("connected", address)
    except OSError:
        pass
try:  # a pair needs no socket(2), and one of it may be sent elsewhere
    one, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    one.connect({abstract + "-letters"!r})
    print("connected", one.send(b"x"))
except ConnectionRefusedError:
    pass
"""
        outcome = run_program(program, replace(LIMITS, seconds=10.0))
        assert (outcome.status, outcome.output) == ("passed", "")
        for listener in (tcp, file, hidden):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()


@sandboxed
def test_nobody_else_is_killed() -> None:
    victim = subprocess.Popen(["sleep", "60"])
    try:
        program = f"""
import os, signal
for target in ({victim.pid}, {os.getpid()}, os.getppid(), 1, -1):
    try:
        os.kill(target, signal.SIGKILL)
    except OSError:
        pass
    os.write(1, b"tried")
"""
        assert "tried" in run_program(program, replace(LIMITS, seconds=10.0)).output
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@sandboxed
def test_disk_cannot_be_filled() -> None:
    program = """
written = 0
try:
    for number in range(100000):
        with open(f"file{number}", "wb", buffering=0) as stream:
            for _ in range(1000):
                written += stream.write(bytes(65536))
except OSError as error:
    print(written, error)
try:
    open("large", "wb").truncate(10**12)
except OSError as error:
    print(error)
"""
    free = os.statvfs(tempfile.gettempdir()).f_bavail
    outcome = run_program(program, replace(LIMITS, seconds=10.0))
    first, second = outcome.output.splitlines()
    assert "No space left" in first or "File too large" in first
    assert LIMITS.disk // 2 < int(first.split()[0]) <= LIMITS.disk
    assert "too large" in second
    lost = (free - os.statvfs(tempfile.gettempdir()).f_bavail) * 4096
    assert lost < 100 * MIB  # others write too
    many = "import os\nfor n in range(10**6): os.mkdir(str(n))"
    assert "No space left" in run_program(many, replace(LIMITS, seconds=10.0)).detail


@pytest.mark.parametrize("isolated", [pytest.param(True, marks=sandboxed), False])
def test_gigabytes_of_output_are_not_kept(isolated: bool) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program = "import os\nwhile True: os.write(1, bytes(65536)); os.write(2, bytes(65536))"
    started = time.monotonic()
    outcome = run_program(program, replace(LIMITS, seconds=30.0), isolated=isolated)
    assert outcome.status == "too much output"
    assert len(outcome.output) == LIMITS.output
    assert time.monotonic() - started < 5.0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20 * 1024  # KiB


FLEEING = """
import os, signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        while True:
            time.sleep(1)
    os._exit(0)
time.sleep({})
"""


@sandboxed
@pytest.mark.parametrize(("seconds", "status"), [(60, "timed out"), (0.3, "failed")])
def test_children_that_fled_and_ignore_signals_are_gone(
    seconds: float, status: str, name: str
) -> None:
    with watched(name) as seen:
        outcome = run_program(named(name, FLEEING.format(seconds)), LIMITS)
    assert outcome.status == status
    assert max(map(len, seen)) >= 2
    assert not processes(name)


@sandboxed
def test_programs_die_with_who_asked_for_them(name: str) -> None:
    asking = f"""
from pipeline.evaluation.sandbox import Limits, run_program
run_program({named(name, FLEEING.format(60))!r}, Limits(seconds=60.0))
"""
    parent = subprocess.Popen([sys.executable, "-c", asking], cwd=ROOT)
    try:
        wait_for(lambda: len(processes(name)) >= 3)  # its own command holds the name too
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not processes(name))


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_without_the_sandbox_limits_and_group_still_hold(name: str) -> None:
    bomb = "x = bytearray(10**9)"
    assert run_program(bomb, LIMITS, isolated=False).status == "out of memory"
    large = "open('a', 'wb').write(bytes(5 * 1024 * 1024))"
    assert "File too large" in run_program(large, LIMITS, isolated=False).detail
    child = named(name, "import os, time\nos.fork()\ntime.sleep(60)")
    with watched(name) as seen:
        assert run_program(child, LIMITS, isolated=False).status == "timed out"
    assert max(map(len, seen)) == 2
    wait_for(lambda: not processes(name))
    place = run_program("import os; print(os.getcwd())", LIMITS, isolated=False).output.strip()
    assert place.startswith(tempfile.gettempdir())
    assert not Path(place).exists()


def test_probe_tells_what_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run without walls, the probe's own program gets out, and says so."""

    def open_door(program: str, limits: Limits) -> sandbox.Outcome:
        return run_program(program, limits, isolated=False)

    monkeypatch.setattr(sandbox, "run_program", open_door)
    reason = probe()
    assert reason is not None
    for word in ("a file outside is readable", "a folder outside is writable", "the network is"):
        assert word in reason
    assert "other processes are in sight" in reason
    assert "memory" not in reason


def test_sandbox_that_cannot_be_made_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_SYSTEM", ("/absent/path", *sandbox._SYSTEM))
    monkeypatch.setattr(os.path, "lexists", lambda path: True)
    with pytest.raises(DecantError, match=r"the sandbox cannot be made on this machine \(.+\)"):
        run_program("pass", LIMITS)
    assert "cannot be made" in str(probe())
