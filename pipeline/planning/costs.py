"""Operations and peak memory of capture and training, from shapes alone.

Memory counts the tensors that exist at the same time at the worst moment. What PyTorch, CUDA and
fragmentation use in addition is covered by a margin (`FITS`). Activations are those of our own
model under autocast (tests/planning/test_costs.py compares the formula with what autograd keeps).

Symbols are those of decoder_shape.py, and L row length, N parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pipeline.config.params import Params
from pipeline.config.train_params import StudentParams
from pipeline.planning.decoder_shape import Shape
from pipeline.planning.devices import DEVICES
from pipeline.planning.teacher_sharing import ALONE, Sharing
from pipeline.runtime.batch_sizes import (
    compared_at_once,
    resolve_batch_rows,
    resolve_head_chunk,
)

FITS = 0.9  # usable share of a device's memory
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LOGIT_COPIES = 3  # a chunk of logits in float32, its rounded copy, and a reduction's result


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the worst moment."""

    weights: float  # with their copies, gradients and the optimizer's state
    activations: float
    logits: float  # one chunk of logits, and the head's gradient

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.weights + self.activations + self.logits


def capture_memory(teacher: Shape, params: Params, dtype: str, sharing: Sharing = ALONE) -> Memory:
    """Return the memory of the teacher's forward over capture.batch_rows rows and a head's chunk.

    If several devices share the teacher, it is that of the first, which holds most: its head is
    whole there. Under fsdp the embedding, the head and two blocks (one at work, one on its way)
    are gathered besides, on every device.
    """
    size = _SIZES[dtype]
    if params.prepare.dequantize:
        teacher = replace(teacher, weight_format=None)
    weights, number = teacher.weight_bytes(size), sharing.devices
    rows, columns = planned_batch_rows(params), number
    tokens = rows * params.corpus.row_length
    gathered = 0.0
    if number > 1:
        whole_head = size * teacher.head
        weights = weights / number + whole_head
        if sharing.parallel == "fsdp":
            weights += whole_head / number if teacher.tied else 0
            block = (teacher.weight_bytes(size) - 2 * whole_head) / teacher.num_layers
            weights += 2 * whole_head + 2 * max(block, 0.0)
            gathered = 2.0 * size * teacher.hidden_size * tokens  # the states of all rows
            tokens, columns = -(-rows // number) * params.corpus.row_length, 1
    return Memory(
        weights=float(weights),
        activations=tokens * _forward_bytes(teacher, params, size, columns) + gathered,
        logits=_logit_bytes(params.capture.head_chunk, teacher.vocab_size, params),
    )


def planned_batch_rows(params: Params) -> int:
    """Return capture.batch_rows as a number on advise.device."""
    kind = "cuda" if DEVICES[params.advise.device].is_gpu else "cpu"
    return resolve_batch_rows(params.capture.batch_rows, params.corpus.row_length, kind)


def _logit_bytes(wanted: int | Literal["auto"], vocab_size: int, params: Params) -> float:
    """Return the bytes of a chunk of logits; `wanted` is a parameter head_chunk."""
    memory = DEVICES[params.advise.device].gpu_memory
    return float(_LOGIT_COPIES * 4 * resolve_head_chunk(wanted, vocab_size, memory) * vocab_size)


def _forward_bytes(teacher: Shape, params: Params, size: int, columns: int) -> float:
    """Return the bytes per token of a forward without backward, at its worst moment.

    That is a block's feed-forward, beside the residual stream and its normalised copy: three
    tensors of width F, or those of transformers' `grouped_mm_experts_forward` for each expert at
    work, either while it gates or while it puts the tokens back in order. Without a fused kernel
    for attention it is the scores, in three copies, and two masks.

    Args:
        columns: number of devices that divide heads and columns among them.
    """
    d, f, length = teacher.hidden_size, teacher.intermediate_size, params.corpus.row_length
    wide = 3 * f / columns
    if teacher.experts:
        gating, ordering = (9, 5) if teacher.experts.biased else (4, 4)
        wide = teacher.experts.per_token * max(d + gating * f / columns, ordering * d)
    scores = (3 * teacher.num_heads / columns + 2) * length if teacher.sinks else 0.0
    return size * (4 * d + max(wide, scores)) + mask_bytes(params)


def mask_bytes(params: Params) -> int:
    """Return the bytes per token of the mask that keeps documents apart: one per key of a row."""
    return params.corpus.row_length if params.prepare.document_mask else 0


def training_memory(student: Shape, params: Params) -> Memory:
    """Return the memory of a training step's forward and backward, on each of advise.devices.

    Weights, gradients and AdamW's two moments are float32: 16 bytes per parameter, or 20 with
    train.keep_best, shared by the devices under fsdp. Autograd keeps a rounded copy of each weight
    of a block until backward.
    """
    train, run, devices = params.train, params.run, params.advise.devices
    trained = trained_parameters(student, params.student)
    size = _SIZES[train.dtype]
    state = 4.0 * student.parameters + (16.0 if train.keep_best else 12.0) * trained
    if run.parallel == "fsdp":
        state /= devices
    rounded = 0 if size == 4 or run.activation_checkpointing else size * student.body_matrices
    rows = -(-train.batch_rows // devices)
    tokens = rows * params.corpus.row_length
    head_gradient = 0 if params.student.lora else 4 * student.head
    chunk = _logit_bytes(run.head_chunk, student.vocab_size, params)
    return Memory(
        weights=state + rounded,
        activations=tokens * (activation_bytes(student, params) + mask_bytes(params)),
        logits=float(chunk + head_gradient + (size * student.head if size == 2 else 0)),
    )


def evaluation_memory(
    teacher: Shape, student: Shape, params: Params, dtype: str, sharing: Sharing = ALONE
) -> Memory:
    """Return the memory of teacher, student and baseline side by side, these in float32."""
    chunk = compared_at_once(teacher.vocab_size, DEVICES[params.advise.device].gpu_memory)
    judged = with_sizes(params, batch_rows=params.evaluate.batch_rows, head_chunk=chunk)
    memory = capture_memory(teacher, judged, dtype, sharing)
    return replace(memory, weights=memory.weights + 2 * 4.0 * student.parameters)


def with_sizes(params: Params, **sizes: int) -> Params:
    """Return params with other sizes of the teacher's batches (`capture.*`)."""
    return params.model_copy(update={"capture": params.capture.model_copy(update=sizes)})


def trained_parameters(student: Shape, params: StudentParams) -> int:
    """Return the number of trained parameters: all, or only those of adapters."""
    if params.lora is None:
        return student.parameters
    return student.lora_parameters(params.lora)


def activation_bytes(student: Shape, params: Params) -> float:
    """Return the bytes per token that autograd keeps for backward.

    With activation checkpointing, each block keeps only its input, and one block at a time is kept
    in full. At the end come the last norm's two tensors and the loss's gradient of hidden states.
    """
    block, width = block_bytes(student, params), 4 * student.hidden_size
    if params.run.activation_checkpointing:
        return float(student.num_layers * width + block + 3 * width)
    return float(student.num_layers * block + 3 * width)


def block_bytes(student: Shape, params: Params) -> float:
    """Return the bytes per token that autograd keeps of one block.

    In float32: the input of each norm and its normalised copy. In autocast's dtype: the factors of
    the matrices, which autocast copies for each matrix; queries and attention's result; keys and
    values, repeated where no fused kernel takes grouped heads, as with a mask; the angles that
    rotated them; gate, its silu, up and product. `size` is that of autocast's dtype. Norms of
    queries and keys keep their input in float32 too, and their normalised copy in autocast's dtype.
    """
    size = _SIZES[params.train.dtype]
    d, a = student.hidden_size, student.query_size
    f = student.active_experts * student.intermediate_size
    copies, turned = (2, 0) if size == 4 else (5, 4 * student.head_size)
    device = DEVICES[params.advise.device]
    repeated = params.prepare.document_mask
    if device.is_gpu and (size == 4 or device.capability < (8, 0)):
        repeated = True  # no fused kernel takes grouped heads there
    keys_and_values = 2 * (a if repeated else student.kv_size)
    normalised = a + student.kv_size if student.qk_norm else 0
    rounded = copies * d + 2 * a + keys_and_values + turned + 4 * f + normalised
    return 4.0 * (4 * d + student.num_heads + normalised) + size * rounded


def step_operations(student: Shape, params: Params) -> float:
    """Return the operations per token of training: 3 forwards (Kaplan et al. 2020, table 1: 6 N).

    With adapters, the products for gradients of frozen weights are saved. Activation checkpointing
    adds a fourth forward of each block up to its last product, which backward does not need.
    """
    length = params.corpus.row_length
    operations = (2.0 if params.student.lora else 3.0) * student.forward_operations(length)
    if params.run.activation_checkpointing:
        last = student.active_experts * student.hidden_size * student.intermediate_size
        operations += student.body_operations(length) - 2.0 * student.num_layers * last
    return operations
