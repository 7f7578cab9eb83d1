"""The engine that runs the teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config.cache_params import Engine
from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.errors import ParamsError
from pipeline.model.folder import teacher_folder
from pipeline.model.quantization import describe_weights, read_quantization
from pipeline.runtime.batch_sizes import gpu_memory, resolve_batch_rows, resolve_head_chunk
from pipeline.runtime.device import inference_dtype
from pipeline.teacher.sharded import ShardedTeacher, choose_parallel, led_ranks
from pipeline.teacher.teacher import Teacher
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.teacher.vllm import VllmTeacher, describe_vllm

_TENSOR = ", tensor parallel "


def teacher_dtype(params: Params, device: torch.device) -> torch.dtype:
    """Return the dtype that prepare.dtype stands for on this device.

    Raises:
        ParamsError: the device has no units for it.
    """
    return inference_dtype(params.prepare.dtype, device, key="prepare.dtype")


def describe_engine(params: Params, engine: Engine | None = None) -> str:
    """Name the engine, its version and its settings as far as they change the teacher's numbers.

    The version of transformers is left out: a release may change a kernel's rounding, but not what
    the model computes, and the gate would find that.

    Args:
        engine: another one than prepare.engine.

    Raises:
        DecantError: the engine is not installed.
    """
    folder = teacher_folder(params.paths.teacher)
    stored = read_quantization(folder)
    if (engine or params.prepare.engine) == "vllm":
        return describe_vllm(params.prepare.vllm, stored)
    name = "transformers" + describe_weights(stored, dequantize=params.prepare.dequantize)
    if (group := led_ranks()) is None:
        return name
    number = group.ranks.world_size
    parallel = choose_parallel(folder, params.prepare.parallel, number)
    return f"{name}{_TENSOR}{number}" if parallel == "tensor" else name


def differ_in_ranks_alone(one: str, other: str) -> bool:
    """Return whether two engines are the same, except for the ranks that share the teacher."""
    return one.partition(_TENSOR)[0] == other.partition(_TENSOR)[0]


def open_teacher(
    params: Params,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    head_chunk: int | None = None,
    engine: Engine | None = None,
) -> Teacher:
    """Open the teacher of paths.teacher, its head in chunks of capture.head_chunk positions.

    Args:
        head_chunk: another number of positions, for callers that make several copies of a chunk.
        engine: another one than prepare.engine.
    """
    folder = teacher_folder(params.paths.teacher)
    chunk = head_chunk or resolve_head_chunk(
        params.capture.head_chunk, vocab_size, gpu_memory(device)
    )
    if (engine or params.prepare.engine) == "vllm":
        return _open_vllm(params, folder, vocab_size, dtype, device, chunk)
    if (group := led_ranks()) is not None:
        return ShardedTeacher(
            group,
            folder,
            vocab_size=vocab_size,
            dtype=dtype,
            head_chunk=chunk,
            parallel=params.prepare.parallel,
        )
    return HuggingFaceTeacher(
        folder,
        vocab_size=vocab_size,
        dtype=dtype,
        device=device,
        head_chunk=chunk,
        dequantize=params.prepare.dequantize,
    )


def _open_vllm(
    params: Params,
    folder: Path,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    head_chunk: int,
) -> VllmTeacher:
    key = "prepare.engine" if params.prepare.engine == "vllm" else "verify.engine"
    if (group := led_ranks()) is not None:
        raise ParamsError(
            f"{key}=vllm starts processes of its own, and torchrun started "
            f"{group.ranks.world_size}: leave torchrun out, and set "
            "prepare.vllm.options.tensor_parallel_size to the number of devices"
        )
    if device.index is not None:
        raise ParamsError(
            f"device={device} does not reach vLLM, which takes the first GPUs that it sees: set "
            "device=cuda, and CUDA_VISIBLE_DEVICES to the GPU's number"
        )
    if params.prepare.dequantize:
        raise ParamsError(
            "prepare.dequantize=true, and vLLM never dequantises: set it to false, or "
            f"{key}=transformers"
        )
    row_length = CorpusSplit(params.paths.corpus, "train").info.row_length
    return VllmTeacher(
        folder,
        params.prepare.vllm,
        row_length=row_length,
        batch_tokens=row_length
        * resolve_batch_rows(params.capture.batch_rows, row_length, device.type),
        vocab_size=vocab_size,
        dtype=dtype,
        device=device,
        head_chunk=head_chunk,
    )
