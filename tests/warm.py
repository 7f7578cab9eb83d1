"""Python processes that start warm: forked from one that has imported the large libraries.

    warm.py FD                          the server, on a listening socket that it inherits
    warm.py SOCKET python's-arguments   a client, which the fixture `warm_python` makes a command of

`python stages/x.py` spends most of its time on importing PyTorch and transformers, several seconds
on a slow machine, and few tests of a stage, of DVC or of make are about that. The command takes the
arguments of `python` and runs them in a process of its own, with folder, environment, streams,
sys.path and exit status as they would be. Third-party libraries alone are imported beforehand:
`pipeline` and `stages` come from where the command finds them, which may be a copy.

A signal reaches the client alone, and a variable that a library reads when it is imported (HF_HOME)
comes too late; the hub is out of reach (HF_HUB_OFFLINE). Tests of these start `sys.executable`.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

LIBRARIES = (
    "click",
    "dvclive",
    "google_crc32c",
    "hydra.core.override_parser.overrides_parser",
    "pydantic",
    "safetensors.torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "zarr",
)


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork a process for each client; this returns in such a process, what it is to do.

    The server ends with its standard input.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for others
    while True:
        if 0 in select.select([listener, 0], [], [])[0]:
            sys.exit()
        connection, _ = listener.accept()
        if not os.fork():
            break
        connection.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += connection.recv(2**16)
    process = os.fork()
    if process:
        for stream in streams:
            os.close(stream)  # a pipe ends with the process, not with us
        threading.Thread(target=end_with_client, args=(connection, process), daemon=True).start()
        _, status = os.waitpid(process, 0)
        with suppress(OSError):  # the client has gone
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return dict(json.loads(request))


def end_with_client(connection: socket.socket, process: int) -> None:
    """Kill the process when the client dies before it."""
    with suppress(OSError):
        connection.recv(1)
        os.kill(process, signal.SIGKILL)


def become(words: list[str], folder: str, environment: dict[str, str], base: list[str]) -> None:
    """Do what `python WORDS` does in a folder and an environment."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    first = folder if module else os.path.dirname(os.path.realpath(words[0]))  # noqa: PTH120
    sys.path[:] = [first, *added, *base]
    importlib.invalidate_caches()
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def ask(address: str, words: list[str]) -> int:
    """The client: have a command run; its exit status, negative for a signal."""
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}  # noqa: PTH109
    data = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [len(data).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(data)
        answer = server.recv(16)
    return int(answer or b"1")


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        path = sys.path[1:]
        become(**serve(socket.socket(fileno=int(sys.argv[1]))), base=path)
    else:
        status = ask(sys.argv[1], sys.argv[2:])
        if status < 0:
            os.kill(os.getpid(), -status)
        sys.exit(status)
