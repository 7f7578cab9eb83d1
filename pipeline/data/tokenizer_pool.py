"""Tokenize blocks of documents in order: in this process, in several, or on a Ray cluster.

The result does not depend on which of the three it is: a block's documents are tokenized one for
one, and blocks are handed out in the order in which they came in. A bounded number of them is in
flight, so that memory is bounded too.

Processes rather than threads, because the tokenizers library's own threads encode only texts in
parallel (1.6 times as fast on 2 cores, in blocks of 32): decoding, and all the work on
conversations, which are rendered and encoded one by one, stay on one core. `datasets.map(num_proc)`
also starts processes, but spends a fifth more processor time, since it writes all tokens to disk as
Arrow and reads them again, and does not stop when a split is full. docs/benchmarks.md has numbers.

Processes are started only once tokenizing has taken as long as starting one does, and until they
are ready this process goes on, so a small corpus does not wait for them. They are killed at the
end, since what they may still be doing is of no use by then; and if this process is killed, they
end by themselves.

They are not a ProcessPoolExecutor, whose processes share two pipes: one that is killed while it
writes its result, by us or for want of memory, leaves half of it there, and the executor waits for
the rest for ever. Here each process has a pipe of its own, which ends with it.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol, Self

from pipeline.data.document_tokenizer import (
    Content,
    DocumentTokenizer,
    Result,
    TokenizerSettings,
    tokenize_block,
)
from pipeline.errors import DecantError
from pipeline.runtime.ray_cluster import errors_unwrapped, ray_cluster

START_SECONDS = 3.0
"""About what a process needs to import its libraries and load a tokenizer."""

_BLOCKS_PER_WORKER = 2  # so that a worker has the next one when its results have been read

Pending = Callable[[], list[Result]]
"""Waits for a block that was submitted, and returns its documents."""


class TokenizerPool(Protocol):
    """Whatever tokenizes blocks of documents."""

    @property
    def depth(self) -> int:
        """How many blocks to submit before the first is waited for."""

    def submit(self, contents: list[Content]) -> Pending:
        """Begin to tokenize a block, or have it tokenized when it is waited for."""


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


class LocalPool:
    """Tokenize in this process, and after a while in several others; a context manager.

    Args:
        here: the tokenizer of this process.
        workers: number of processes; with 1 this process, on one thread, does it all.

    Raises:
        DecantError: a process was killed.
    """

    def __init__(self, here: DocumentTokenizer, settings: TokenizerSettings, workers: int) -> None:
        self._here = here
        self._settings = settings
        self._num_workers = workers
        self._seconds = 0.0  # that tokenizing has taken in this process
        self._workers: list[_Worker] = []
        self._next_worker: Iterator[_Worker] = iter(())  # endless once they are started
        self._threads = os.environ.get("TOKENIZERS_PARALLELISM")

    def __enter__(self) -> Self:
        if self._num_workers == 1:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
        if self._threads is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = self._threads
        else:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)

    @property
    def depth(self) -> int:
        """One while this process tokenizes; then enough to keep the others busy."""
        return self._num_workers * _BLOCKS_PER_WORKER if self._is_ready() else 1

    def submit(self, contents: list[Content]) -> Pending:
        """See `TokenizerPool`."""
        if not self._is_ready():
            return partial(self._tokenize, contents)
        return next(self._next_worker).submit(contents)

    def _is_ready(self) -> bool:
        """Return whether there are other processes, and all have loaded the tokenizer."""
        if not self._workers and self._num_workers > 1 and self._seconds >= START_SECONDS:
            self._start()
        return bool(self._workers) and all(worker.is_ready() for worker in self._workers)

    def _tokenize(self, contents: list[Content]) -> list[Result]:
        started = time.perf_counter()
        results = self._here(contents)
        self._seconds += time.perf_counter() - started
        return results

    def _start(self) -> None:
        """Start the processes, and let them load the tokenizer."""
        with _interrupts_deferred():
            for _ in range(self._num_workers):
                self._workers.append(_Worker(self._settings, self._num_workers))
        self._next_worker = cycle(self._workers)


class _Worker:
    """A process that tokenizes the blocks that it is sent, one after the other.

    Args:
        num_workers: how many of them there are, for the error.

    Raises:
        DecantError: the process was killed.
    """

    def __init__(self, settings: TokenizerSettings, num_workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # which gives it no other file of ours
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()  # the other copy is the process's, so the pipe ends when the process does
        self._num_workers = num_workers
        self._num_submitted = 0
        self._num_received = 0
        self._received: dict[int, list[Result] | Exception] = {}
        self.submit([])  # it loads the tokenizer

    def is_ready(self) -> bool:
        """Return whether the process has loaded the tokenizer, or ended; does not wait."""
        return self._num_received > 0 or self.connection.poll()

    def submit(self, contents: list[Content]) -> Pending:
        """Send a block."""
        try:
            self.connection.send(contents)
        except OSError:
            raise self._killed() from None
        number = self._num_submitted
        self._num_submitted += 1
        return partial(self._wait, number)

    def kill(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _wait(self, number: int) -> list[Result]:
        """Blocks of several sources may be waited for in another order than they were sent."""
        while number not in self._received:
            try:
                self._received[self._num_received] = self.connection.recv()
            except (EOFError, OSError):
                raise self._killed() from None
            self._num_received += 1
        results = self._received.pop(number)
        if isinstance(results, Exception):
            raise results
        return results

    def _killed(self) -> DecantError:
        return DecantError(
            "a process that tokenizes was killed, probably because the machine's memory is full: "
            f"close other programs, or set --workers below {self._num_workers}, then run the same "
            "command"
        )


def _work(connection: Connection, settings: TokenizerSettings) -> None:
    """Tokenize what comes by the connection, until the process at its other end closes it."""
    blocks: queue.SimpleQueue[list[Content]] = queue.SimpleQueue()

    def receive() -> None:  # also while a block is tokenized, so that sending one never waits
        try:
            while True:
                blocks.put(connection.recv())
        finally:  # even if the other process was killed
            os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    while True:
        results: list[Result] | Exception
        try:
            results = tokenize_block(settings, blocks.get())
        except BaseException as error:  # a panic of the tokenizer is no Exception
            results = _portable(error)
            results.add_note(traceback.format_exc())  # pickle leaves out where it was raised
        with suppress(OSError):  # the other process has ended
            connection.send(results)


def _portable(error: BaseException) -> Exception:
    """Return an error that another process can raise: itself if pickle knows how."""
    try:
        same = ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        same = None
    if isinstance(error, Exception) and type(same) is type(error):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Let a Ctrl-C take effect at the end, and never in processes that are started meanwhile.

    Those inherit this thread's signal mask, and this process ends them. The mask does not hold a
    signal back from this process, as its other threads receive it: hence the handler.
    """
    resource_tracker.ensure_running()  # or else the first process starts it: it unblocks SIGINT
    received: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


class _RayPool:
    def __init__(self, ray: Any, settings: TokenizerSettings, tasks: int | None) -> None:
        self._ray = ray
        cores = int(ray.cluster_resources().get("CPU", 1))
        self.depth = tasks or max(1, cores) * _BLOCKS_PER_WORKER
        self._remote = ray.remote(tokenize_block).options(scheduling_strategy="SPREAD")
        self._settings = ray.put(settings)

    def submit(self, contents: list[Content]) -> Pending:
        """See `TokenizerPool`."""
        return partial(self._wait, self._remote.remote(self._settings, contents))

    def _wait(self, reference: Any) -> list[Result]:
        remedy = "make sure that each machine has enough memory"
        with errors_unwrapped(self._ray, "the tokenization", remedy):
            results: list[Result] = self._ray.get(reference)
        return results


@contextmanager
def ray_pool(settings: TokenizerSettings, tasks: int | None) -> Iterator[TokenizerPool]:
    """Tokenize by tasks on the Ray cluster that RAY_ADDRESS names.

    Without that, one is started on this machine and stopped at the end. Every machine needs Decant,
    and the teacher's folder under the same path.

    Args:
        tasks: how many are in flight; None means two per core of the cluster.

    Raises:
        DecantError: Ray is not installed, not reachable, or loses a task again and again.
    """
    with ray_cluster("tokenize") as ray:
        yield _RayPool(ray, settings, tasks)
