"""Several processes as torchrun would start them, forked from one that has imported everything."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.waiting import PATIENCE


@contextmanager
def start_ranks(
    context: ForkServerContext, count: int, work: Callable[..., None], *args: Any
) -> Iterator[list[BaseProcess]]:
    """Run `work(*args)` in `count` ranks; what still runs at the end of the block is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[BaseProcess] = [
        context.Process(target=_in_rank, args=(rank, count, port, work, args), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_ranks(
    context: ForkServerContext, count: int, work: Callable[..., None], *args: Any
) -> None:
    """Run `work(*args)` in `count` ranks to their ends, which must be good."""
    with start_ranks(context, count, work, *args) as processes:
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0


def _in_rank(
    rank: int, count: int, port: int, work: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    work(*args)


def train_stage(log: Path, *words: str) -> None:
    run_stage("train", log, *words)


def run_stage(name: str, log: Path, *words: str) -> None:
    """`stages/<name>.py` with everything it prints in files under `log`, one a rank."""
    log.mkdir(exist_ok=True)
    file = os.open(log / os.environ.get("RANK", "0"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import_module(f"stages.{name}").main(words, standalone_mode=True)
