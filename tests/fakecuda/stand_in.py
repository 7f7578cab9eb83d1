"""A pytest plugin: real values for the stand-in of a GPU, and counts of its copies and waits.

It is loaded in the child processes that tests/fakecuda/test_fakecuda.py starts. There PyTorch's
CUDA build runs over runtime.c and driver.c, which keep device memory in host memory and run no
kernels. After each operation on CUDA tensors, the plugin computes the same operation on CPU tensors
that share their memory. So devices, dtypes, allocations, copies, streams and waits are those of a
GPU, and values are those of a CPU: a wrong device fails, and a result can be compared.

What the values do not show: rounding and speed of real kernels, races between streams, dropout
within fused attention, and overflow of shared memory or registers.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import thread as futures
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.nn.attention.varlen  # it defines the operations of torch_attn
from torch import Tensor
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from pipeline.runtime import triton_usable

ROOT = f"{Path(__file__).parents[2]}/"
PROJECT = (f"{ROOT}pipeline/", f"{ROOT}stages/")
PROBE = "pipeline.runtime.triton_probe"
aten, torch_attn = torch.ops.aten, torch.ops.torch_attn

# ---- Counts: copies and waits, by the line of the project that caused them

Counts = Counter[tuple[str, str]]  # (kind, place)
_counts: Counts | None = None


def _place() -> str:
    """Return the innermost line of the project on this thread's stack."""
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PROJECT):
            return f"{file.removeprefix(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "a thread of PyTorch's (backward)"


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_ulong)
def _report(kind: bytes, _: int) -> None:
    if _counts is not None:
        _counts[kind.decode(), _place()] += 1


@contextmanager
def counting() -> Iterator[Counts]:
    """Count copies between host and GPU, and waits of the host, within the block."""
    global _counts
    if "FAKECUDA_CAPABILITY" not in os.environ:
        pytest.skip("only the stand-in counts")
    _counts = Counter()
    try:
        yield _counts
    finally:
        _counts = None


def total(counts: Counts, kind: str) -> int:
    return sum(number for (found, _), number in counts.items() if kind in found)


_shown: list[str] = []


def show(title: str, counts: Counts) -> None:
    """Show counts at the end of the run, the most frequent first."""
    rows = [f"  {n:3d} x {kind:23s} {place}" for (kind, place), n in counts.most_common()]
    _shown.extend(["", title, *rows])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in _shown:
        terminalreporter.write_line(line)


# ---- Values: each operation is computed on the CPU, in the memory of the CUDA tensors


_with_values = True


@contextmanager
def _set_values(on: bool) -> Iterator[None]:
    global _with_values
    before, _with_values = _with_values, on
    try:
        yield
    finally:
        _with_values = before


def without_values() -> AbstractContextManager[None]:
    """Compute nothing within the block, so that sizes of real models fit: values are undefined."""
    return _set_values(False)


_with_kernels = True


@contextmanager
def without_kernels() -> Iterator[None]:
    """Interpret no Triton kernels within the block, which takes 0.1 s for a row of logits."""
    global _with_kernels
    _with_kernels = False
    try:
        yield
    finally:
        _with_kernels = True


class Values(TorchDispatchMode):
    """Compute each operation a second time, on CPU tensors over the same memory."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _with_values or FakeTensor in types:  # DTensor asks fake tensors for shapes
            return func(*args, **kwargs)
        if not all(t in (Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented  # DTensor comes back with its local tensors
        if torch.is_inference_mode_enabled() and func._can_decompose():
            with self:  # composite operations arrive whole; their parts are what runs
                return func.decompose(*args, **kwargs)
        if (
            func.namespace not in ("aten", "fsdp", "torch_attn")
            or func in _WITHOUT_VALUES
            or not _on_gpu(args, kwargs)
        ):
            return func(*args, **kwargs)
        if func in _OF_UNKNOWN_SIZE:
            return _of_unknown_size(func, args, kwargs)
        if func in _BY_INDEX:
            args = (args[0], _as_numbers(args[1]), *args[2:])
        out = _CUDNN[func](*args, **kwargs) if func in _CUDNN else func(*args, **kwargs)
        _compute(func, args, kwargs, out)
        return out


def _on_gpu(*values: Any) -> bool:
    return any(
        (isinstance(x, Tensor) and x.is_cuda) or (isinstance(x, torch.device) and x.type == "cuda")
        for x in _leaves(values)
    )


def _leaves(*values: Any) -> list[Any]:
    return list(tree_flatten(values)[0])


def on_host(tensor: Tensor) -> Tensor:
    """Return a CPU tensor in the memory of a CUDA tensor."""
    if not tensor.is_cuda:
        return tensor
    storage = tensor.untyped_storage()
    if not storage.nbytes() or not tensor.numel():
        return torch.empty_like(tensor, device="cpu")
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    count = storage.nbytes() // tensor.element_size()
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=count)
    return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


_generators: WeakKeyDictionary[torch.Generator, torch.Generator] = WeakKeyDictionary()


def _for_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return on_host(value)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.Generator) and value.device.type == "cuda":
        if value not in _generators:
            _generators[value] = torch.Generator().manual_seed(value.initial_seed())
        return _generators[value]
    return value


def _compute(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Compute an operation on the CPU, and write the results that are new into `out`."""
    old = {t.untyped_storage()._cdata for t in _leaves(args, kwargs) if isinstance(t, Tensor)}
    found = [
        t if isinstance(t, Tensor) and t.untyped_storage()._cdata not in old else None
        for t in _leaves(out)
    ]
    if not func._schema.is_mutable and not any(t is not None for t in found):
        return  # a view
    host_args, host_kwargs = tree_map(_for_cpu, (args, kwargs))
    if func in _ON_CPU:
        results = _ON_CPU[func](**_by_name(func, host_args, host_kwargs))
    else:
        results = func(*host_args, **host_kwargs)
    for tensor, result in zip(found, _leaves(results), strict=func not in _ON_CPU):
        if tensor is not None and tensor.numel():
            assert tensor.shape == result.shape, (func, tensor.shape, result.shape)
            on_host(tensor).copy_(result)


# ---- Operations whose result has a size that the GPU tells the host: one wait each

_OF_UNKNOWN_SIZE = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,  # not of unknown size: a bool that it reads from the GPU
}
_BY_INDEX = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


def _of_unknown_size(func: Any, args: Any, kwargs: Any) -> Any:
    torch.cuda.current_stream().synchronize()
    device = next(x.device for x in _leaves(args) if isinstance(x, Tensor) and x.is_cuda)
    results = func(*tree_map(_for_cpu, args), **tree_map(_for_cpu, kwargs))
    return tree_map(lambda x: _placed(x, device) if isinstance(x, Tensor) else x, results)


def _placed(result: Tensor, device: torch.device) -> Tensor:
    """Return the values in a new CUDA tensor, without a copy that would be counted."""
    tensor = torch.empty_like(result, device=device)
    if result.numel():
        on_host(tensor).copy_(result)
    return tensor


def _as_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Replace masks by the numbers of their elements, as the operation itself would."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.is_cuda and index.dtype in (torch.bool, torch.uint8):
            places = _of_unknown_size(aten.nonzero.default, (index,), {})
            numbers += [_placed(on_host(p), index.device) for p in places.unbind(1)]
        else:
            numbers.append(index)
    return numbers


# ---- Operations that PyTorch has for CUDA alone; arguments by the names in their schemas


def _product(
    *,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
    beta: float = 1,
    alpha: float = 1,
    **of: Any,
) -> Tensor:
    """Compute mm, bmm, addmm or baddbmm with a dtype for their result."""
    first, second = (factor.to(out_dtype) for factor in list(of.values())[-2:])
    product = torch.matmul(first, second)
    if len(of) == 3:
        product = beta * of["self"].to(out_dtype) + alpha * product
    return product if out is None else out.copy_(product)


def _weights(
    query: Tensor, key: Tensor, attn_bias: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, float]:
    """Return attention's weights, float32 [B, H, L, S], and the scale of the scores."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.float() @ key.float().mT * scale
    if attn_bias is not None and attn_bias.numel():
        scores = scores + attn_bias.float()
    if is_causal:
        shown = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~shown, -torch.inf)
    return scores.softmax(-1), scale


def _attention(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> tuple[Tensor]:
    weights, _scale = _weights(query, key, attn_bias, is_causal, scale)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return ((weights @ value.float()).to(query.dtype),)


def _attention_grads(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    **of: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v (Dao et al. 2022, appendix B.2)."""
    grad = (of["grad_out_"] if "grad_out_" in of else of["grad_out"]).float()
    weights, scale = _weights(query, key, attn_bias, is_causal, scale)
    groups = query.shape[1] // key.shape[1]
    of_weights = grad @ value.float().repeat_interleave(groups, 1).mT
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale

    def shared(x: Tensor) -> Tensor:  # the sum over the query heads of a key/value head
        return x.unflatten(1, (-1, groups)).sum(2)

    return (
        (of_scores @ key.float().repeat_interleave(groups, 1)).to(query.dtype),
        shared(of_scores.mT @ query.float()).to(key.dtype),
        shared(weights.mT @ grad).to(value.dtype),
    )


def _across(*, query: Tensor, key: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, **_: Any) -> Tensor:
    """Return the bias [T, S] that keeps the segments of packed queries and keys apart."""
    segments = [
        torch.searchsorted(bounds, torch.arange(len(x), dtype=bounds.dtype), right=True)
        for x, bounds in ((query, cu_seq_q), (key, cu_seq_k))
    ]
    return torch.where(segments[0][:, None] == segments[1], 0.0, -torch.inf)


def _within_segments(attend: Callable[..., tuple[Tensor, ...]], **of: Any) -> tuple[Tensor, ...]:
    """Attend, or compute the gradients, within segments that are packed: queries [T, H, E].

    The only window that the project asks for is the one that makes attention causal.
    """
    assert of["window_size"] == ([-1, 0] if of["is_causal"] else [-1, -1])
    of["attn_bias"] = _across(**of)
    for name in {"query", "key", "value", "grad_out"} & set(of):
        of[name] = of[name].transpose(0, 1)[None]
    return tuple(x[0].transpose(0, 1) for x in attend(**of))


_ON_CPU: dict[Any, Callable[..., Any]] = get_decompositions([aten._fused_rms_norm_backward]) | {
    aten._scaled_dot_product_flash_attention.default: _attention,
    aten._scaled_dot_product_efficient_attention.default: _attention,
    aten._scaled_dot_product_cudnn_attention.default: _attention,
    aten._scaled_dot_product_flash_attention_backward.default: _attention_grads,
    aten._scaled_dot_product_efficient_attention_backward.default: _attention_grads,
    aten._scaled_dot_product_cudnn_attention_backward.default: _attention_grads,
    torch_attn._varlen_attn.default: partial(_within_segments, _attention),
    torch_attn._varlen_attn_backward.default: partial(_within_segments, _attention_grads),
}
_ON_CPU |= {
    overload: _product
    for operation in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
    for overload in (operation.dtype, operation.dtype_out)
}


def _by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


# cuDNN's attention builds graphs with the real driver's help, so its outputs are made here.


def _cudnn_outputs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    out, empty = torch.empty_like(query), query.new_empty(0)
    lse = query.new_empty(*query.shape[:3], 1, dtype=torch.float32)
    return out, lse, empty, empty, query.shape[2], key.shape[2], empty, empty, empty


def _cudnn_grads(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> Any:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_CUDNN = {
    aten._scaled_dot_product_cudnn_attention.default: _cudnn_outputs,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_grads,
}

_WITHOUT_VALUES = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.record_stream.default,
    aten.is_pinned.default,
    aten._pin_memory.default,
    aten._fused_sdp_choice.default,
    aten._local_scalar_dense.default,
    aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
    aten.set_.source_Tensor,
    aten.resize_.default,
}

# ---- Triton's kernels: compiled and launched as on a GPU, then interpreted in the same memory


def _interpret_kernels() -> None:
    from triton import language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    one_at_a_time = threading.Lock()  # the interpreter changes modules while it runs a kernel

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=warmup, **kwargs)
        if _with_values and (_with_kernels or self.fn.__module__ == PROBE) and not warmup:
            host_args, host_kwargs = tree_map(_for_cpu, (args, kwargs))
            kernel = interpreter.InterpretedFunction(self.fn)
            # The interpreter remaps the names that the kernel sees, those of triton.language; the
            # functions of triton.language itself see those of its module `core`.
            with one_at_a_time:
                scope = interpreter._patch_lang(tl.sum.fn)
                try:
                    kernel.run(*host_args, grid=grid, warmup=False, **host_kwargs)
                finally:
                    scope.restore()
        return compiled

    @cache
    def rewritten(function: Any) -> Any:
        return interpreter.InterpretedFunction(function).rewrite()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return rewritten(self.fn)(*args, **kwargs)

    JITFunction.run = run
    JITFunction.__call__ = call  # of a function by a kernel; legal only while it is interpreted
    probe = triton_usable._launch

    def probe_with_values(device: torch.device) -> None:
        with _set_values(True), Values():  # also for a caller that needs no values
            probe(device)

    triton_usable._launch = probe_with_values


# ---- The plugin


def pytest_configure() -> None:
    install()


def install() -> None:
    """Prepare this process; values are computed within `with Values()`, and in pools' threads."""
    ctypes.CDLL(os.environ["LD_PRELOAD"]).fakecuda_report_to(_report)
    _interpret_kernels()
    work = futures._WorkItem.run

    def work_with_values(self: Any, *args: Any) -> None:
        with Values():  # a mode holds for one thread
            work(self, *args)

    futures._WorkItem.run = work_with_values  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[Any]:
    with Values():
        return (yield)
