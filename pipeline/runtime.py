"""Device, ranks, number formats, seeds, progress: what depends on the machine, in one place.

The only file that may read or set environment variables. It reads what torchrun sets and where
compilers are (libraries read their own), and sets one, for Ray.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import DecantError, ParamsError

Item = TypeVar("Item")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Launch:
    """A process among those that torchrun started together."""

    rank: int  # 0 to ranks - 1
    ranks: int
    local_rank: int  # among those on this machine: the number of its GPU
    attempt: int  # how often torchrun has started this machine's ranks again, if they are all


def launch() -> Launch | None:
    """What torchrun says of this process; None where it was started by hand."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    rank, ranks, local_rank = (int(os.environ[name]) for name in names[:3])
    attempt = 0
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return Launch(rank=rank, ranks=ranks, local_rank=local_rank, attempt=attempt)


def is_first_rank() -> bool:
    """Whether this process is the one that talks: rank 0, or the only one."""
    here = launch()
    return here is None or here.rank == 0


def pick_device(name: str) -> torch.device:
    """`auto` takes the GPU where there is one; `cpu` and `cuda` are taken at their word."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ParamsError("device=cuda, but PyTorch sees no CUDA GPU: set device to auto or cpu")
    return torch.device(name)


def require_compiler(device: torch.device) -> None:
    """Check that there is what torch.compile needs: a C++ compiler on a CPU, C for Triton on CUDA.

    Raises:
        ParamsError: there is none.
    """
    variable, usual = ("CC", "gcc clang") if device.type == "cuda" else ("CXX", "g++ clang++")
    wanted = os.environ.get(variable, usual).split()
    if not any(shutil.which(name) for name in wanted):
        raise ParamsError(
            f"train.compile=true needs a compiler on this machine, and {' or '.join(wanted)} is "
            f"not found: install one, name another in the variable {variable}, or set "
            "train.compile=false"
        )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The teacher's or autocast's number format; `auto` is float16 on a GPU, bfloat16 on CPU."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.bfloat16
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16", as it stands in params.yaml and fingerprints."""
    return str(dtype).removeprefix("torch.")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def mm_float32(
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """A @ b with factors rounded to `dtype` and products ACCUMULATED AND RETURNED in float32.

    A plain bf16 product returns bf16, which rounds a logit of 20 by up to 0.06: far more than
    everything else in the cache. On CPU, oneDNN rounds float32 factors itself when told to, at the
    bf16 units' speed; on CUDA `out_dtype` keeps the accumulator.

    Args:
        a: [n, m]. b: [m, p]. dtype: float32, bfloat16 or float16.
        out: optional float32 [n, p] to write into.
        add_to: optional float32 [n, p] to which the product is added in place (beta = 1).
    """
    if a.device.type == "cuda" and dtype != torch.float32:
        product = torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
        if add_to is not None:
            return add_to.add_(product)
        return product if out is None else out.copy_(product)
    if dtype == torch.float16:  # no fp16 units on CPU: round the factors, multiply in float32
        a, b = a.to(dtype), b.to(dtype)
    a, b = a.float(), b.float()
    with _cpu_matmul_precision("bf16" if dtype == torch.bfloat16 else "ieee"):
        if add_to is not None:
            return add_to.addmm_(a, b)
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


@contextmanager
def _cpu_matmul_precision(precision: str) -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def progress(
    items: Iterable[Item], *, what: str, unit: str, total: int | None = None
) -> tqdm[Item]:
    """Iterate with a progress bar: rate and time left; on a log file a line every ten seconds.

    Only rank 0 shows it.
    """
    interactive = sys.stderr.isatty()
    return tqdm(
        items,
        desc=what,
        total=total,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=interactive,
        mininterval=0.2 if interactive else 10.0,
        maxinterval=10.0,
        leave=interactive,
        disable=not is_first_rank(),
    )


def progress_bar(*, what: str, total: int | None, unit: str) -> tqdm[Any]:
    """The same bar for loops that count by `update`."""
    nothing: tuple[Any, ...] = ()
    return progress(nothing, what=what, unit=unit, total=total)


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a flag, so that a step can end and be saved.

    A second Ctrl-C interrupts at once. Outside the main thread it does nothing.
    """

    requested = False

    def __enter__(self) -> Self:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        say("stopping after this step; Ctrl-C again stops at once")


def import_transformers() -> Any:
    """The transformers library, without progress bars of its own.

    Imported when needed, since that takes seconds and half of the stages do without.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def import_ray() -> Any:
    """Ray, an extra, with the usage statistics off that it would otherwise send to its makers.

    Raises:
        DecantError: it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # for the clusters that this process starts
    try:
        import ray
    except ImportError:
        raise DecantError(
            "--engine ray needs the package ray: install it by `pip install decant[ray]`"
        ) from None
    return ray


def import_peft() -> Any:
    """PEFT, an extra, for adapters of low rank.

    Raises:
        DecantError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise DecantError(
            "student.lora needs the package peft: install it by `pip install decant[lora]`"
        ) from None
    return peft


@cache
def has_triton() -> bool:
    """Whether Triton can be imported; PyTorch's CUDA builds for Linux bring it along."""
    return importlib.util.find_spec("triton") is not None


def say(message: str) -> None:
    """Print a line for the user above any progress bar; of several ranks only the first does."""
    if not is_first_rank():
        return
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()
