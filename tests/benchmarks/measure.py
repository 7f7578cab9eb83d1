"""What several benchmarks measure by: medians of interleaved runs, peaks of processes, targets."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipeline.targets.topk import TopK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def processor() -> str:
    """What the benchmark runs on, for its first line."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of a CPU"


def finish() -> None:
    """Wait until the GPU, if there is one, has done all work that was given to it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def medians(
    variants: dict[str, Callable[[], object]], rounds: int, *, busy: bool = False
) -> dict[str, float]:
    """Median seconds of each variant; the variants take turns, after one round of warm-up.

    On a GPU, a variant's time ends when its work there has ended.

    Args:
        busy: the machine has other work, which would be measured, too: count the processor's
            seconds, on one thread.
    """
    clock = time.process_time if busy else time.perf_counter
    if busy:
        torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, call in variants.items():
            finish()
            started = clock()
            call()
            finish()
            if turn:
                times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def forget_peak(device: str = DEVICE) -> float:
    """Let the high-water mark begin again; returns MiB in use now.

    On a GPU it is that of PyTorch's allocator, else that of the kernel (Linux).
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib(device)


def peak_mib(device: str = DEVICE) -> float:
    """Most memory this process has held since `forget_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def available_mib() -> float:
    """Memory the machine, or its GPU, could give out now."""
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**20
    lines = Path("/proc/meminfo").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) / 1024


def in_child(measure: Callable[..., float], *arguments: Any) -> float:
    """`measure(*arguments)` in a process of its own, which has held nothing else before."""
    # A process forked from one that has asked for a GPU cannot use it.
    context = multiprocessing.get_context("spawn" if DEVICE == "cuda" else "forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


def made_up_targets(tokens: int, vocabulary: int, k: int, device: str = DEVICE) -> TopK:
    """Targets as a cache returns them, without the memory that a teacher's logits would take.

    Distinct random ids, 0.9 of the mass on them at temperature 1 and 0.6 at temperature 2.
    """
    width = vocabulary // k
    ids = torch.arange(k, device=device) * width
    ids = ids + torch.randint(width, (tokens, k), device=device)
    scores = torch.randn(tokens, k, device=device).mul_(2.0).sort(-1, descending=True).values
    logprobs = scores.log_softmax(-1) + torch.tensor(0.9).log()
    normaliser = (logprobs / 2.0).logsumexp(-1, keepdim=True) - torch.tensor(0.6).log()
    return TopK(
        has_target=torch.ones(tokens, dtype=torch.bool, device=device),
        ids=ids,
        logprobs=logprobs,
        lse=torch.zeros(tokens, device=device),
        lse_tau=normaliser,
        entropy=torch.ones(tokens, device=device),
        sampled_ids=ids[:, :0],
        sampled_counts=ids[:, :0].int(),
        sampled_logprobs=logprobs[:, :0],
        num_sampled=0,
        temperatures=(2.0,),
        vocab_size=vocabulary,
    )
