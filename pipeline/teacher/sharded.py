"""A teacher of transformers whose weights are divided among the processes that torchrun started.

    torchrun --nproc-per-node 4 stages/prepare.py

Rank 0 runs the stage as if it were alone. The other ranks hold their part of the model and compute
when rank 0 asks for hidden states, so no stage needs code for several ranks, and only rank 0 reads
the corpus and writes the cache. Head and reduction run on rank 0 alone; they are a few percent of
the work of a model that needs more than one device.

prepare.parallel says how the weights are divided, both ways by transformers' DistributedConfig:

tensor: each rank holds some of the heads and columns of every layer, and all ranks compute the
    same rows together. Heads and feed-forward width must divide by the number of ranks, and
    transformers must have a tensor-parallel plan for the architecture. Sums over ranks round
    otherwise than one process does, so the cache's fingerprint names the number of ranks.
fsdp: each rank holds a slice of every tensor and computes its own share of the rows, for which the
    weights are gathered one layer at a time (FSDP2, forward only). It works for any architecture
    and any number of ranks, and computes what one process computes.
auto: tensor where it is possible, else fsdp.

Shapes: B batch, L length, D hidden, V vocabulary, n ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.errors import DecantError, OtherRankError, ParamsError
from pipeline.model.attention_mask import document_positions
from pipeline.model.huggingface import (
    LogitsError,
    body_of,
    body_states,
    empty_model,
    keeps_documents_apart,
    load_causal_lm,
    max_positions,
    probe_tokens,
    require_own_logits,
    without_other_inputs,
)
from pipeline.model.logit_transform import LogitTransform
from pipeline.model.quantization import read_quantization
from pipeline.runtime.device import compute_dtype
from pipeline.runtime.optional import import_transformers
from pipeline.runtime.ranks import Ranks, join_ranks, lost_touch
from pipeline.runtime.transfer import to_device
from pipeline.teacher.teacher import Teacher
from pipeline.teacher.transformers import mixes_documents

Parallel = Literal["tensor", "fsdp"]
_PATIENCE = timedelta(days=30)  # rank 0 may work without the teacher for as long as it likes

_FILLED = {
    "bias",
    "embed_positions",
    "embed_scale",
    "normalizer",
    "per_layer_input_scale",
    "per_layer_projection_scale",
    "router_input_scale",
    "weight",
}
"""Names of buffers outside the checkpoint that tests/teacher/test_divided_families.py compared."""


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A request to load the model."""

    folder: Path
    dtype: torch.dtype
    vocab_size: int
    parallel: Parallel


@dataclass(frozen=True, kw_only=True)
class _Compute:
    """A request for the hidden states of these rows."""

    tokens: Tensor  # int64 [B, L]
    positions: Tensor | None  # int64 [B, L]


@dataclass(frozen=True, kw_only=True)
class _Stop:
    """The end of rank 0's work."""

    exit_code: int


class TeacherRanks:
    """The ranks that share a teacher, seen from one of them."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._messages = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def send(self, request: _Open | _Compute | _Stop) -> None:
        """Send a request from rank 0 to the others."""
        dist.broadcast_object_list([request], src=0, group=self._messages)

    def receive(self) -> Any:
        """Wait for the next request of rank 0."""
        request: list[Any] = [None]
        dist.broadcast_object_list(request, src=0, group=self._messages)
        return request[0]


_leads: TeacherRanks | None = None
"""The ranks that this process leads, if it is rank 0 of several."""


def led_ranks() -> TeacherRanks | None:
    """Return the ranks whose first one runs this stage; None in a stage that runs alone."""
    return _leads


@contextmanager
def lead(device: str) -> Iterator[None]:
    """Let the block's teachers be shared with the other ranks; called on rank 0."""
    global _leads
    with join_ranks(device) as ranks:
        _leads = TeacherRanks(ranks)
        try:
            yield
        except (DecantError, SystemExit) as end:
            code = getattr(end, "exit_code", getattr(end, "code", 1))
            with suppress(RuntimeError):  # the others may have failed in the same way, and be gone
                _leads.send(_Stop(exit_code=int(code or 0)))
            raise
        else:
            _leads.send(_Stop(exit_code=0))
        finally:
            _leads = None


def follow(device: str) -> None:
    """Compute for rank 0 until it stops; called on the other ranks.

    Raises:
        OtherRankError: rank 0 failed.
    """
    with join_ranks(device) as ranks:
        group = TeacherRanks(ranks)
        part: _Part | None = None
        while not isinstance(request := group.receive(), _Stop):
            if isinstance(request, _Open):
                part = None  # the memory of the previous one
                part = _Part(request, ranks)
                part.head()
            elif part is not None:
                part.compute(request)
    if request.exit_code:
        raise OtherRankError(request.exit_code)


class ShardedTeacher(Teacher):
    """A model folder, loaded in parts by all ranks; the object exists on rank 0 alone.

    Args:
        folder, vocab_size, dtype, head_chunk: see `Teacher`.
        parallel: the value of prepare.parallel.

    Raises:
        ParamsError: the model cannot be divided among the ranks in the way that was asked for.
        DecantError: see `HuggingFaceTeacher`.
    """

    def __init__(
        self,
        group: TeacherRanks,
        folder: Path,
        *,
        vocab_size: int,
        dtype: torch.dtype,
        head_chunk: int,
        parallel: Literal["auto", "tensor", "fsdp"],
    ) -> None:
        self._group = group
        self.parallel = choose_parallel(folder, parallel, group.ranks.world_size)
        request = _Open(
            folder=folder.absolute(), dtype=dtype, vocab_size=vocab_size, parallel=self.parallel
        )
        group.send(request)
        self._part = _Part(request, group.ranks)
        head, bias = self._part.head()
        self._config = self._part.model.config
        super().__init__(
            folder,
            head=head,
            bias=bias,
            transform=LogitTransform.of_config(self._config),
            vocab_size=vocab_size,
            dtype=dtype,
            device=group.ranks.device,
            max_seq_len=max_positions(self._config),
            head_chunk=head_chunk,
        )

    @property
    def num_parameters(self) -> int:
        return self._part.num_parameters

    def describe(self) -> str:
        ranks = self._group.ranks
        where = f"{ranks.world_size} processes ({self.parallel}, {ranks.device.type})"
        return self._described(self._config.model_type, where)

    def states(self, tokens: Tensor, doc_ids: Tensor | None) -> Tensor:
        if doc_ids is not None and not self._part.keeps_apart:
            raise mixes_documents(self._config.model_type)
        positions = None if doc_ids is None else document_positions(doc_ids)
        request = _Compute(tokens=tokens.cpu(), positions=positions)
        self._group.send(request)
        return self._part.compute(request)


class _Part:
    """One rank's part of the model. All ranks make the same calls in the same order."""

    def __init__(self, request: _Open, ranks: Ranks) -> None:
        self._ranks = ranks
        self._parallel = request.parallel
        try:
            self._open(request)
        except DecantError as error:
            cause = error.__cause__
            while cause is not None:
                if lost_touch(cause):  # another rank went away, and the model is not to blame
                    raise cause from None
                cause = cause.__cause__
            raise

    def _open(self, request: _Open) -> None:
        ranks = self._ranks
        target = compute_dtype(request.dtype, ranks.device)
        distributed = _distributed_config()
        empty = without_other_inputs(empty_model(request.folder))
        self.num_parameters = int(empty.num_parameters())  # before fsdp unties the head
        if request.parallel == "tensor":
            how = distributed(tp_plan="auto")
        else:
            stack = _layer_stack(empty)
            how = distributed(
                fsdp_size=ranks.world_size, fsdp_plan={f"{stack}.*": "free_full_weight"}
            )
        model = load_causal_lm(request.folder, target, what="teacher", distributed_config=how)
        self.model = without_other_inputs(model).requires_grad_(False)
        if target != request.dtype:  # weights rounded to float16, computed in float32
            for parameter in self.model.parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.copy_(local.to(request.dtype))
        if unknown := _unknown_buffers(self.model):
            raise self._undivided(request.folder, f"its buffer {min(unknown)} may stay unfilled")
        try:
            require_own_logits(request.folder, self.model)
        except LogitsError:
            raise
        except DecantError as error:
            raise self._undivided(request.folder, str(error.__cause__ or error)) from error
        if not bool(body_states(self.model, probe_tokens(self.model)).isfinite().all()):
            raise self._undivided(request.folder, "its states are not finite")
        # Gathered, since a rank that goes away during the probe looks like a model that fails it.
        self.keeps_apart = all(ranks.gather(keeps_documents_apart(self.model, request.vocab_size)))

    def _undivided(self, folder: Path, reason: str) -> DecantError:
        other = "fsdp" if self._parallel == "tensor" else "tensor"
        return DecantError(
            f"transformers cannot run {folder}, a {self.model.config.model_type!r} model, divided "
            f"among processes by {self._parallel} ({reason}): try prepare.parallel={other}, or use "
            "one process"
        )

    @torch.no_grad()
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Gather the head's matrix and bias whole."""
        head = self.model.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        return _whole(weight), None if bias is None else _whole(bias)

    @torch.no_grad()
    def compute(self, request: _Compute) -> Tensor:
        """Return the states [B, L, D] on rank 0; elsewhere the return value has no meaning."""
        inputs = [request.tokens] + ([] if request.positions is None else [request.positions])
        device = self._ranks.device
        if self._parallel == "tensor":
            return body_states(self.model, *(to_device(tensor, device) for tensor in inputs))
        rows, number = len(request.tokens), self._ranks.world_size
        share = ceil(rows / number)
        # Every rank takes part in every gathering of weights, so the last row fills up the shares.
        first = self._ranks.rank * share
        mine = torch.arange(first, first + share).clamp(max=rows - 1)
        hidden = body_states(self.model, *(to_device(tensor[mine], device) for tensor in inputs))
        hidden = hidden.contiguous()
        parts = [torch.empty_like(hidden) for _ in range(number)] if first == 0 else None
        dist.gather(hidden, parts)
        return hidden if parts is None else torch.cat(parts)[:rows]


def _unknown_buffers(model: Any) -> set[str]:
    """Return the names of buffers that a checkpoint does not hold and that were never compared.

    transformers 5.23 leaves those of Falcon-H1 (`mup_vector`) as the memory happened to be when it
    loads a divided model, which no test of a model against itself can see.
    """
    buffers = {name.rpartition(".")[2] for name, _ in model.named_non_persistent_buffers()}
    return {name for name in buffers - _FILLED if not name.endswith("inv_freq")}


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach().clone()


@cache
def choose_parallel(folder: Path, wanted: str, number: int) -> Parallel:
    """Return the way in which a model is divided among a number of processes.

    Raises:
        ParamsError: tensor is wanted and impossible, or the weights are quantised.
        DecantError: the folder has no model of a known architecture, or transformers is too old.
    """
    _distributed_config()
    if (stored := read_quantization(folder)) is not None:
        raise ParamsError(
            f"{folder} is quantised ({stored.name}), and its weights are not divided among "
            f"{number} processes: start one, or set prepare.engine to vllm and "
            "prepare.vllm.options.tensor_parallel_size to the number of devices"
        )
    if wanted == "fsdp":
        return "fsdp"
    reason = _why_not_tensor(empty_model(folder), number)
    if wanted == "auto":
        return "fsdp" if reason else "tensor"
    if reason:
        raise ParamsError(
            f"prepare.parallel=tensor cannot divide the teacher {folder} among {number} processes, "
            f"since {reason}: start another number, or set prepare.parallel to fsdp"
        )
    return "tensor"


def _distributed_config() -> Any:
    """Return the class by which transformers takes the division of a model."""
    transformers = import_transformers()
    found = getattr(getattr(transformers, "distributed", None), "DistributedConfig", None)
    if "fsdp_size" not in getattr(found, "__dataclass_fields__", {}):
        raise DecantError(
            f"transformers {transformers.__version__} does not divide models among processes as "
            "5.23 does: upgrade it, or start one process"
        )
    return found


def _why_not_tensor(model: Any, number: int) -> str:
    """Say why a model cannot be divided by heads and columns; empty if it can."""
    if not any("*" in rule for rule in model.tp_plan):  # some plans divide the head alone
        return f"transformers has no tensor-parallel plan for a {model.config.model_type!r} model"
    config = model.config.get_text_config(decoder=True)
    heads = ("num_attention_heads", "num_key_value_heads")
    for name in (*heads, "intermediate_size", "moe_intermediate_size"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size % number:
            return f"{name}={size} does not divide by it"
    return ""


def _layer_stack(model: Any) -> str:
    """Return the name of the decoder's longest list of modules: its layers, in any architecture."""
    within = set(body_of(model).modules())
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and module in within
    }
    name: str = max(lists, key=lambda name: lists[name])
    return name
