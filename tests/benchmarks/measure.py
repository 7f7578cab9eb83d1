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


def medians(
    variants: dict[str, Callable[[], object]], rounds: int, *, busy: bool = False
) -> dict[str, float]:
    """Median seconds of each variant; the variants take turns, after one round of warm-up.

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
            started = clock()
            call()
            if turn:
                times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def forget_peak() -> float:
    """Let the kernel's high-water mark begin again (Linux); returns MiB in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def peak_mib() -> float:
    """Most memory this process has held since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def available_mib() -> float:
    """Memory the machine could give out now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) / 1024


def in_child(measure: Callable[..., float], *arguments: Any) -> float:
    """`measure(*arguments)` in a process of its own, which has held nothing else before."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


def made_up_targets(tokens: int, vocabulary: int, k: int, device: str = "cpu") -> TopK:
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
        ids=ids,
        logprobs=logprobs,
        lse=torch.zeros(tokens, device=device),
        lse_tau=torch.cat((torch.zeros_like(normaliser), normaliser), -1),
        entropy=torch.ones(tokens, device=device),
        sampled_ids=ids[:, :0],
        sampled_logprobs=logprobs[:, :0],
        temperatures=(1.0, 2.0),
        vocab_size=vocabulary,
    )
