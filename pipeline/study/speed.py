"""Speed and memory of generation: ours beside Hugging Face's.

Both generate greedily from the same random prompts and the same number of tokens, in turns, in
`study.dtype`: Hugging Face's `generate` with its default attention (`sdpa`), ours with
pipeline/generation/sampling.py. One run gives both speeds: prefill is the time to the first token,
decode the time from there to the last. Results are medians over `study.repeats`, after one run that
does not count; memory is measured in a separate run. On a machine that is busy with other things
the numbers are noisy; their ratio is less so.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ParamsError
from pipeline.generation.sampling import GenerationSettings, decode_steps
from pipeline.runtime.device import compute_dtype, dtype_name, place_rounded
from pipeline.study.comparison import Part
from pipeline.study.subject import Subject


@dataclass(frozen=True)
class Speed:
    """Speed and memory of one model at one batch size."""

    prefill: float  # tokens of prompt per second, until the first new token
    decode: float  # new tokens per second after it, all rows together
    peak: float | None  # peak bytes beyond the loaded model; None if not measurable here


def speed(subject: Subject) -> Part:
    """Measure tokens per second and peak memory by batch size."""
    params = subject.params
    need, context = params.prompt_tokens + params.max_new_tokens, subject.our_config.max_seq_len
    if need > context:
        raise ParamsError(
            f"study.prompt_tokens={params.prompt_tokens} and study.max_new_tokens="
            f"{params.max_new_tokens} exceed the model's context of {context}: shorten them"
        )
    if params.max_new_tokens < 2:
        raise ParamsError(
            "study.max_new_tokens=1 leaves no decode step to time: set it to 2 or more"
        )
    dtype = subject.speed_dtype
    ours, theirs = (
        _in_format(model, dtype, subject.device) for model in (subject.ours, subject.theirs)
    )
    measured = {size: _measure(subject, ours, theirs, size) for size in params.batch_sizes}
    smallest = measured[params.batch_sizes[0]]
    ratio = smallest["ours"].decode / smallest["Hugging Face"].decode
    return Part(
        name="speed",
        title="Speed and memory",
        notes=[
            f"Ours decodes {ratio:.2f} times as fast as Hugging Face's generate at batch "
            f"{params.batch_sizes[0]}, on {subject.device.type} with {torch.get_num_threads()} "
            "threads. Measured, and noisy: nothing here passes or fails.",
            f"Prompts of {params.prompt_tokens} tokens, {params.max_new_tokens} new ones, "
            f"{dtype_name(dtype)}; medians of {params.repeats}. Memory is what generating takes "
            "beyond the model.",
        ],
        tables={
            "By batch size": [
                ("batch", "", "prefill, tokens/s", "decode, tokens/s", "peak memory, MB"),
                *(
                    (size, name, f"{s.prefill:,.0f}", f"{s.decode:,.1f}", _megabytes(s.peak))
                    for size, by_name in measured.items()
                    for name, s in by_name.items()
                ),
            ]
        },
    )


def _in_format(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the model itself in float32, which comparisons need, or a copy in `dtype`."""
    same = compute_dtype(dtype, device) == torch.float32
    return model if same else place_rounded(copy.deepcopy(model), dtype, device)


def _measure(subject: Subject, ours: Any, theirs: Any, batch: int) -> dict[str, Speed]:
    """Measure both models in turns on the same prompts, int64 [batch, prompt_tokens]."""
    params = subject.params
    ids = max(subject.tokenizer.get_vocab().values()) + 1
    prompts = torch.randint(
        min(ids, subject.our_config.vocab_size),
        (batch, params.prompt_tokens),
        generator=torch.Generator().manual_seed(subject.seed),
    )
    runs = {
        "ours": partial(_ours, ours, params.max_new_tokens),
        "Hugging Face": partial(_theirs, theirs, params.max_new_tokens),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    peaks: dict[str, float | None] = {}
    for turn in range(params.repeats + 1):
        for name, run in runs.items():
            pair = _timed(run, prompts)
            times[name] += [pair] if turn else []  # the first run starts with cold caches
    for name, run in runs.items():
        peaks[name] = peak_bytes(subject.device, partial(run, prompts))
    return {
        name: Speed(
            prefill=prompts.numel() / statistics.median(first for first, _ in pairs),
            decode=batch
            * (params.max_new_tokens - 1)
            / statistics.median(rest for _, rest in pairs),
            peak=peaks[name],
        )
        for name, pairs in times.items()
    }


def _timed(run: Callable[[Tensor], list[float]], prompts: Tensor) -> tuple[float, float]:
    """Return the seconds to the first token, and from there to the last."""
    start = time.perf_counter()
    marks = run(prompts)
    return marks[0] - start, marks[-1] - marks[0]


def _ours(model: Any, new_tokens: int, prompts: Tensor) -> list[float]:
    """Return the time of each token; the token is on the CPU by then, so a GPU has finished it."""
    settings = GenerationSettings(max_new_tokens=new_tokens)
    steps = decode_steps(model, prompts.tolist(), settings)
    return [time.perf_counter() for _ in steps]


class _Clock:
    """A streamer in Hugging Face's sense: `generate` passes it the prompt, then each token."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, value: Tensor) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass


def _theirs(model: Any, new_tokens: int, prompts: Tensor) -> list[float]:
    clock, tokens = _Clock(), prompts.to(model.device)
    with _default_attention(model):
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            eos_token_id=None,  # min_new_tokens would work too, but reads every row of logits
            max_new_tokens=new_tokens,
            streamer=clock,
        )
    return clock.marks[1:]


@contextmanager
def _default_attention(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> float | None:
    """Return the peak memory used while `work` runs, beyond the memory used before.

    On a GPU this is PyTorch's own count. On a CPU it is the process's resident memory, whose peak
    can be reset on Linux (proc(5), clear_refs); on other systems the result is None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return float(torch.cuda.max_memory_allocated(device) - before)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed but kept memory would hide the next need
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        work()
        return None
    start = _resident("VmRSS")
    work()
    return _resident("VmHWM") - start


def _resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024.0 * int(found[1])


def _megabytes(count: float | None) -> str:
    return "not measured" if count is None else f"{count / 1e6:,.0f}"
