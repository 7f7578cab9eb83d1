"""Capture on a Ray cluster: one actor per GPU, each of which computes whole shards.

With prepare.engine=vllm an actor is a whole engine: it takes as many GPUs of one machine as the
engine's tensor parallel size says (times its pipeline parallel size).

This uses Ray Core rather than Ray Data: the unit of work is a shard number, an actor writes its
result to storage and not through Ray, and an actor receives only the parameters. Ray schedules the
tasks, restarts a lost actor and repeats its task. The cache makes that safe, since a shard exists
once its marker is committed, and a repeated shard is only confirmed or written again with the same
bytes.

The cluster is the one that RAY_ADDRESS names (as for any Ray program); otherwise one is started on
this machine and stopped at the end. Every machine needs Decant, and teacher, corpus and cache under
the same paths or URLs. The driver only needs the corpus: the first actor creates, checks or repairs
the cache before the others start, so only it counts the id order.

An actor whose machine is lost waits, with its shards, for another machine with a free GPU. If none
appears, stop with Ctrl-C; the same command continues on the machines that are left.

The bytes are the same: a shard computed by an actor equals one computed by the local engine on the
same kind of machine. On a CPU an actor takes its share of the cores, and the number of threads may
change the order in which a large matrix product is summed, hence its last bit; the fingerprint does
not tell processors apart.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.capture.capture import (
    Capture,
    CaptureResult,
    disk_errors,
    lock_cache,
    open_captures,
    say_repaired,
)
from pipeline.config.params import Params
from pipeline.errors import ParamsError
from pipeline.logit_cache.integrity import Damage
from pipeline.runtime.console import announce, progress_bar
from pipeline.runtime.ray_cluster import errors_unwrapped, ray_cluster

# A shard that kills its actor every time (for lack of memory) must eventually fail. The limit is
# not on a task's tries, because Ray uses up several before it knows that a machine is lost.
_RESTARTS = 10  # per actor
_ENOUGH_MEMORY = (
    "make sure that each actor has enough memory (capture.batch_rows, prepare.shard_rows)"
)
_TASKS_PER_ACTOR = 2  # one shard is compressed and written while the teacher works on the next


def capture_on_ray(
    params: Params, *, actors: int | None = None, overwrite: bool = False, repair: bool = False
) -> list[CaptureResult]:
    """Capture the missing shards of each split on a Ray cluster.

    Committed shards stay, whatever ends this call: an error, Ctrl-C, or the loss of the cluster.

    Args:
        actors: None means as many as the cluster's GPUs allow, or a single one if there is no GPU.

    Raises:
        DecantError: as for the local engine; or Ray is not installed, not reachable, or lost.
        ParamsError: there are more actors than GPUs in the cluster (without GPUs: processors).
    """
    with (
        lock_cache(params),
        ray_cluster("capture") as ray,
        errors_unwrapped(ray, "the capture", _ENOUGH_MEMORY),
    ):
        handles = _start_actors(ray, params, actors)
        todo: list[Outstanding] = ray.get(
            handles[0].open.remote(overwrite=overwrite, repair=repair)
        )
        for split in todo:
            say_repaired(split.split, split.repaired)
        shards, tokens = sum(len(s.missing) for s in todo), sum(s.tokens for s in todo)
        announce("prepare", f"{len(handles)} actors capture {tokens:,} tokens in {shards} shards")
        _distribute(ray, handles, todo)
    return [
        CaptureResult(
            shards=split.num_shards,
            shards_done=len(split.missing),
            shards_missing=0,
            tokens_done=split.tokens,
        )
        for split in todo
    ]


@dataclass(frozen=True, kw_only=True)
class Outstanding:
    """The shards of a split that are still to be captured."""

    split: str
    num_shards: int
    missing: list[int]
    tokens: int  # in the missing shards
    repaired: tuple[Damage, ...]


class CaptureActor:
    """One process on one device: the teacher, and the captures of all splits.

    Nothing is loaded before the first call, so that an error is raised by that call. Several
    threads make calls.

    Args:
        params: parameters with absolute paths.
        threads: number of PyTorch threads on a CPU; None leaves it as it is.
    """

    def __init__(self, params: Params, threads: int | None) -> None:
        if threads is not None:  # Ray's default is one
            torch.set_num_threads(min(threads, os.cpu_count() or 1))
        self._params = params
        self._captures: dict[str, Capture] = {}
        self._turn = threading.Lock()  # held while the teacher is loaded or used

    def open(self, *, overwrite: bool = False, repair: bool = False) -> list[Outstanding]:
        """Create, continue or repair the cache, and list the missing shards."""
        with self._turn:
            captures = open_captures(self._params, overwrite=overwrite, repair=repair)
            self._captures = {capture.corpus.split: capture for capture in captures}
        return [_outstanding(capture) for capture in captures]

    def capture_shard(self, split: str, shard: int) -> int:
        """Compute and commit one shard; return its number of tokens."""
        if split not in self._captures:  # any actor but the first, or a restarted one
            self._open_once()
        capture = self._captures[split]
        tokens = capture.tokens_of([shard])
        if not capture.writer.is_committed(shard):  # it is if an actor was lost before it answered
            with self._turn:
                computed = capture.compute(shard)
            with disk_errors("", capture.writer):
                capture.write(computed)
        return tokens

    def _open_once(self) -> None:
        with self._turn:
            if not self._captures:
                captures = open_captures(self._params)
                self._captures = {capture.corpus.split: capture for capture in captures}


def _outstanding(capture: Capture) -> Outstanding:
    missing = capture.writer.missing()
    return Outstanding(
        split=capture.corpus.split,
        num_shards=capture.writer.layout.num_shards,
        missing=missing,
        tokens=capture.tokens_of(missing),
        repaired=capture.repaired,
    )


def _distribute(ray: Any, handles: list[Any], todo: list[Outstanding]) -> None:
    """Give every missing shard to whichever actor is free."""
    from ray.util import ActorPool

    shards = [(split.split, shard) for split in todo for shard in split.missing]
    pool = ActorPool(handles * _TASKS_PER_ACTOR)
    done = pool.map_unordered(lambda actor, which: actor.capture_shard.remote(*which), shards)
    tokens = sum(split.tokens for split in todo)
    with progress_bar(what="prepare", total=tokens, unit="tok") as bar:
        for tokens_done in done:
            bar.update(tokens_done)


def _start_actors(ray: Any, params: Params, actors: int | None) -> list[Any]:
    """Start actors on the cluster's GPUs, or on its processors."""
    cpus = int(ray.cluster_resources().get("CPU", 0))
    gpus = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    size = params.prepare.vllm.num_devices if params.prepare.engine == "vllm" else 1
    room = sum(number // size for number in gpus) if params.device != "cpu" else 0
    number = actors or room or 1
    if not room and any(gpus) and params.device != "cpu":
        raise ParamsError(
            f"prepare.vllm.options asks for {size} GPUs of one machine, and none of the Ray "
            f"cluster's has more than {max(gpus)}: lower tensor_parallel_size, or add machines"
        )
    if number > (room or cpus):
        each = f" of {size} GPUs each" if room and size > 1 else ""
        has = f"{sum(gpus)} GPUs" if room else f"{cpus} processors"
        raise ParamsError(
            f"--actors {number}{each} exceeds the Ray cluster's {has}: lower it, or add machines"
        )
    remote = ray.remote(CaptureActor).options(
        num_cpus=1,
        num_gpus=size if room else 0,
        max_restarts=_RESTARTS,
        max_task_retries=-1,
        max_concurrency=_TASKS_PER_ACTOR,
        scheduling_strategy="SPREAD",
    )
    threads = None if room else cpus // number
    return [remote.remote(_with_absolute_paths(params), threads) for _ in range(number)]


def _with_absolute_paths(params: Params) -> Params:
    """Make all paths absolute, since an actor's working folder is not the driver's."""
    paths = {
        name: value.absolute() if isinstance(value, Path) else value for name, value in params.paths
    }
    update: dict[str, Any] = {"paths": params.paths.model_copy(update=paths)}
    if python := params.prepare.vllm.python:
        vllm = params.prepare.vllm.model_copy(update={"python": python.absolute()})
        update["prepare"] = params.prepare.model_copy(update={"vllm": vllm})
    return params.model_copy(update=update)
