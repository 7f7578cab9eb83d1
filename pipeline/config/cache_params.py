"""Sections of params about the cache of the teacher's top-K: its choice, capture and check."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from pipeline.config.section import (
    Count,
    CountOrAuto,
    CountOrZero,
    Dtype,
    Fraction,
    Positive,
    Section,
    Share,
    Temperature,
)

DeviceName = Literal[
    "cpu", "cpu-avx2", "t4", "l4", "rtx3090", "rtx4090", "a100-40gb", "a100-80gb", "h100", "h200"
]
"""The devices that a plan can be made for; `pipeline/planning/devices.py` has their numbers."""


class AdviseParams(Section):
    """A sample of rows, to choose prepare.k and prepare.temperatures; and the plan."""

    sample: Fraction = 0.001
    """Share of the training rows in the sample."""
    min_rows: Count = 16
    """Rows in the sample at least, or all rows if there are fewer."""
    ks: Annotated[tuple[Count, ...], Field(min_length=1)] = (16, 32, 48, 64, 96, 128, 192, 256)
    """The values of K that are compared; those beyond the vocabulary are left out."""
    device: DeviceName = "cpu"
    """The device that `advise --plan` plans for, which need not be present: cpu (with AMX),
    cpu-avx2, t4, l4, rtx3090, rtx4090, a100-40gb, a100-80gb, h100 or h200."""
    devices: Count = 1
    """Number of these devices that share each stage of the plan."""
    mfu: Share = 0.3
    """Share of the device's peak that the plan assumes in capture and training; 0.3 was measured
    with the demo on two cores."""


Engine = Literal["transformers", "vllm"]

_SET_BY_DECANT = {
    "model": "paths.teacher",
    "tokenizer": "paths.teacher",
    "dtype": "prepare.dtype",
    "max_model_len": "corpus.row_length",
    "runner": None,
    "convert": None,
    "task": None,
    "pooler_config": None,
    "hf_overrides": None,
    "enable_prefix_caching": None,
    "skip_tokenizer_init": None,
    "trust_remote_code": None,
    "data_parallel_size": None,
}
"""Arguments of vLLM that Decant sets, or that no one may set, with the key that decides instead."""


class VllmParams(Section):
    """vLLM, for engine=vllm (docs/teachers.md)."""

    python: Path | None = None
    """Interpreter of the environment in which vLLM is installed; null: the one that runs Decant."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments passed on to vLLM's engine, for example {tensor_parallel_size: 4, quantization:
    fp8, gpu_memory_utilization: 0.7}; not those that Decant sets, such as dtype."""

    @field_validator("options")
    @classmethod
    def _none_of_ours(cls, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in options:
            if name in _SET_BY_DECANT:
                key = _SET_BY_DECANT[name]
                remedy = f"set {key} instead" if key else "leave it out"
                raise ValueError(f"{name} of vLLM is set by Decant: {remedy}")
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            size = options.get(name, 1)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size} is not a number of devices: set it to 1 or more")
        return options

    @property
    def num_devices(self) -> int:
        """Number of devices that one engine takes."""
        sizes = (self.options.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
        return prod(size for size in sizes if isinstance(size, int))


class PrepareParams(Section):
    """The capture of the teacher's top-K."""

    engine: Engine = "transformers"
    """What runs the teacher: transformers in this process, or vllm in a process of its own."""
    k: CountOrZero = 64
    """K, the number of most probable ids kept per position."""
    num_sampled: CountOrZero = 0
    """M, the number of ids per position sampled from the teacher's distribution outside the K."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Keeps at each position only the fewest ids that hold this probability mass, at most k;
    null keeps k everywhere."""
    positions: Literal["in_loss", "high_entropy"] = "in_loss"
    """The positions that get a target: in_loss, all whose next token is in the loss; high_entropy,
    those of them where the teacher is least certain. Cross-entropy counts at the others too."""
    entropy_quantile: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Quantile of the teacher's entropy over a row's positions in the loss; with
    positions=high_entropy, those above it get a target."""
    temperatures: tuple[Temperature, ...] = (1.0, 2.0, 4.0)
    """Temperatures that train.temperature can take. Each one other than 1 adds 2 bytes per token,
    and the first of them also the log-probabilities of sampled ids."""
    dtype: Dtype = "auto"
    """The teacher's dtype, of its activations alone if it is quantised: float32, bfloat16, float16
    or auto. auto is float16 on a GPU; on a CPU it is bfloat16 if the CPU has units for it,
    otherwise float32. float16 on a CPU rounds the weights and computes in float32."""
    parallel: Literal["auto", "tensor", "fsdp"] = "auto"
    """How the processes that torchrun starts divide the teacher's weights: tensor divides every
    layer by heads and columns; fsdp divides every tensor, and gathers one layer at a time; auto is
    tensor where that is possible, else fsdp. A single process ignores it."""
    dequantize: bool = False
    """Whether quantised weights of the teacher are converted to dtype when they are loaded, which
    takes an unquantised model's memory; false: they are used as they are, or refused where that is
    not possible."""
    document_mask: bool = True
    """Whether a document attends to itself only, in teacher and student; false: to the whole row
    before it. A run that uses a cache takes the cache's value."""
    vllm: VllmParams = VllmParams()
    chunk_rows: Count = 32
    """Rows per zarr chunk, the unit of reading."""
    shard_rows: Count = 32
    """Rows per shard, the unit of writing and resuming; a multiple of chunk_rows."""

    @model_validator(mode="after")
    def _whole_chunks(self) -> Self:
        if self.shard_rows % self.chunk_rows:
            raise ValueError(
                f"shard_rows={self.shard_rows} must be a multiple of chunk_rows={self.chunk_rows}"
            )
        if not self.k + self.num_sampled:
            raise ValueError("k=0 and num_sampled=0 keep nothing: set one of them")
        if self.top_p is not None and not self.k:
            raise ValueError(f"top_p={self.top_p:g} cuts the k ids, and k=0 keeps none: set k")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures={self.temperatures} repeat")
        return self

    @property
    def stored_temperatures(self) -> tuple[float, ...]:
        """The temperatures whose normalisers are stored: all but 1, at which it is 0."""
        return tuple(tau for tau in self.temperatures if tau != 1.0)

    @property
    def stored_quantile(self) -> float:
        """The quantile of the entropy that the choice of positions applies; 0 keeps all."""
        return self.entropy_quantile if self.positions == "high_entropy" else 0.0


class CaptureParams(Section):
    """Memory and time of the teacher's forward passes; beyond rounding, no result depends on it."""

    batch_rows: CountOrAuto = "auto"
    """Rows per forward pass of the teacher; auto is 8 on a CPU, and as many as hold 16,384
    tokens on a GPU."""
    head_chunk: CountOrAuto = "auto"
    """Positions whose logits are in memory at once; auto is 256 on a CPU, and on a GPU the power
    of 2 from 256 to 4,096 that a 64th of its memory holds."""


class VerifyParams(Section):
    """The gate: how much of the cache is recomputed, and the limits for passing."""

    engine: Engine = "transformers"
    """What runs the live teacher: transformers or vllm. If prepare.engine is another, the noise
    floor is the difference between the two engines."""
    batches: Count = 100
    """Batches of rows that are recomputed and compared."""
    batch_rows: Count = 1
    """Rows per batch."""
    noise_batches: Count = 4
    """Batches that measure the noise floor and the negative control."""
    noise_factor: Annotated[float, Field(ge=1.0)] = 3.0
    """Multiple of the noise floor that a limit allows; the limits are at most those below."""
    min_mean_cosine: Fraction = 0.999
    """Limit for the mean cosine of probabilities over all positions."""
    min_row_cosine: Fraction = 0.99
    """Limit for the mean cosine of probabilities in the worst row."""
    max_mean_kl: Positive = 0.003
    """Limit for the mean of KL(live || cached), in nats per token."""
    min_top1: Fraction = 0.97
    """Limit for the share of positions with the same most probable id."""
    min_overlap: Fraction = 0.95
    """Limit for the mean share of the K ids that cache and live teacher have in common."""
    max_logprob_error: Positive = 0.25
    """Limit for the mean error of log-probabilities in the band of k where it is largest, in
    nats."""
    max_lse_error: Positive = 0.5
    """Limit for the mean error of lse, in nats."""
    max_normaliser_error: Positive = 0.1
    """Limit for the mean error of lse_tau and for that of the entropy, in nats."""
