"""The engine that runs the teacher."""

from __future__ import annotations

import torch

from pipeline.config.params import Params
from pipeline.model.folder import teacher_folder
from pipeline.model.quantization import describe_weights, read_quantization
from pipeline.runtime.device import inference_dtype
from pipeline.teacher.sharded import ShardedTeacher, choose_parallel, led_ranks
from pipeline.teacher.teacher import Teacher
from pipeline.teacher.transformers import HuggingFaceTeacher


def teacher_dtype(params: Params, device: torch.device) -> torch.dtype:
    """Return the dtype that prepare.dtype stands for on this device.

    Raises:
        ParamsError: the device has no units for it.
    """
    return inference_dtype(params.prepare.dtype, device, key="prepare.dtype")


def describe_engine(params: Params) -> str:
    """Name the engine, its version and its settings as far as they change the teacher's numbers.

    The version of transformers is left out: a release may change a kernel's rounding, but not what
    the model computes, and the gate would find that.
    """
    folder = teacher_folder(params.paths.teacher)
    stored = read_quantization(folder)
    engine = "transformers" + describe_weights(stored, dequantize=params.prepare.dequantize)
    if (group := led_ranks()) is None:
        return engine
    number = group.ranks.world_size
    parallel = choose_parallel(folder, params.prepare.parallel, number)
    return f"{engine}, tensor parallel {number}" if parallel == "tensor" else engine


def open_teacher(
    params: Params,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    head_chunk: int | None = None,
) -> Teacher:
    """Open the teacher of paths.teacher, its head in chunks of capture.head_chunk positions.

    Args:
        head_chunk: another number of positions, for callers that make several copies of a chunk.
    """
    folder = teacher_folder(params.paths.teacher)
    head_chunk = head_chunk or params.capture.head_chunk
    if (group := led_ranks()) is not None:
        return ShardedTeacher(
            group,
            folder,
            vocab_size=vocab_size,
            dtype=dtype,
            head_chunk=head_chunk,
            parallel=params.prepare.parallel,
        )
    return HuggingFaceTeacher(
        folder,
        vocab_size=vocab_size,
        dtype=dtype,
        device=device,
        head_chunk=head_chunk,
        dequantize=params.prepare.dequantize,
    )
