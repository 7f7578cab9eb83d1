"""Sections of params about the student: its shape, its training and how a run is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.section import (
    BelowOne,
    Count,
    CountOrAuto,
    CountOrZero,
    Dtype,
    Fraction,
    Positive,
    PositiveOrZero,
    Section,
    Share,
    Temperature,
)

Divergence = Literal[
    "forward_kl",
    "renormalised_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
]
"""The distance of the student from the teacher, defined in `pipeline/losses/reference.py`."""


ReportTo = Literal["tensorboard", "wandb", "mlflow"]
"""A logger of training curves besides DVCLive, see `pipeline/training/loggers.py`."""


class LoraParams(Section):
    """Low-rank adapters beside frozen matrices (Hu et al. 2021), merged when the run ends."""

    rank: Count = 16
    """r, the number of columns of the matrix A and of rows of B."""
    alpha: Positive = 32.0
    """The product B A is scaled by alpha / rank."""
    dropout: BelowOne = 0.0
    """Probability of dropping an element of an adapter's input."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    """Names of the linear layers that get an adapter."""


class StudentParams(Section):
    """The student: its initial weights, the part that is trained, and its shape if random."""

    init: Literal["random", "checkpoint", "layers"] = "layers"
    """The initial weights: random, those of a checkpoint, or some layers of the teacher."""
    checkpoint: Path | None = None
    """Folder of any causal language model, for init=checkpoint."""
    layers: tuple[int, ...] = (0, 1, 2, 8, 9, 11, 15, 16, 17, 18, 20, 23, 24, 27, 28, 29)
    """The teacher's decoder layers that the student takes, counted from 0, for init=layers. The
    demo's 16 of SmolLM2's 30 were found by repeatedly dropping the layer that raised the loss
    least."""
    lora: LoraParams | None = None
    """Trains low-rank adapters alone; null trains all weights. Example: {rank: 16, alpha: 32,
    dropout: 0.0, targets: [q_proj, k_proj, v_proj, o_proj]}."""
    hidden_size: Count = 512
    """Width of the hidden states. This and the keys below are the shape for init=random, by default
    70.8 M parameters with the demo's tokenizer."""
    num_layers: Count = 12
    """Number of decoder layers."""
    num_heads: Count = 8
    """Number of attention heads."""
    num_kv_heads: Count = 2
    """Number of key and value heads, each shared by num_heads / num_kv_heads heads."""
    head_dim: CountOrAuto = "auto"
    """Width of a head: a number, or auto, hidden_size / num_heads."""
    intermediate_size: Count = 2048
    """Width of the feed-forward layers."""
    vocab_size: CountOrAuto = "auto"
    """Rows of the embedding and the head: a number, or auto, the tokenizer's ids rounded up to a
    multiple of 64."""
    max_seq_len: Count = 512
    """Tokens of the longest sequence, at least corpus.row_length."""
    rope_theta: Positive = 1_000_000.0
    """Base of the RoPE frequencies."""
    norm_eps: Positive = 1e-6
    """Epsilon of RMSNorm."""
    dropout: BelowOne = 0.0
    """Probability of dropping an attention weight or an output of attention or feed-forward, in
    training."""
    attention_bias: bool = True
    """Whether the query, key and value projections have biases."""
    qk_norm: bool = False
    """Whether each head's query and key are normalised before they are rotated, as in Qwen3."""
    tie_embeddings: bool = True
    """Whether the head shares the embedding's weights."""

    @model_validator(mode="after")
    def _adapters_need_a_start(self) -> Self:
        if self.lora and self.init == "random":
            raise ValueError(
                "lora trains adapters beside frozen weights, which init=random leaves untrained: "
                "set init to checkpoint or layers, or lora to null"
            )
        return self


class TrainParams(Section):
    """Optimisation of the student: everything that decides weights, curves and a run's identity."""

    targets: Literal["cached", "online", "none"] = "cached"
    """The source of the teacher's distributions: cached, online (the live teacher) or none, for
    cross-entropy alone."""
    alpha: Fraction = 0.5
    """Weight of the divergence; cross-entropy has weight 1 - alpha."""
    alpha_end: Fraction | None = None
    """The value that alpha moves to, linearly over the steps; null keeps alpha constant."""
    divergence: Divergence = "forward_kl"
    """Divergence of the student from the teacher: forward_kl, renormalised_kl, reverse_kl,
    jensen_shannon, skew_kl, skew_reverse_kl or total_variation; with sampled ids only
    forward_kl."""
    temperature: Temperature = 1.0
    """Temperature of teacher and student in the divergence; from a cache, one of
    prepare.temperatures."""
    k: Count | None = None
    """Use only the first k stored ids; null uses all."""
    steps: Count | None = 64
    """Optimizer steps; null if epochs is set."""
    epochs: Positive | None = None
    """Epochs over the training rows, in place of steps; a partial step is rounded up."""
    batch_rows: Count = 2
    """Rows per forward pass, of all processes together."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step."""
    learning_rate: Positive = 0.001
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Course of the learning rate after warm-up: cosine, or wsd, constant and then a short
    decay."""
    warmup_steps: CountOrZero = 6
    """Steps over which the learning rate rises linearly."""
    decay_fraction: Share = 0.2
    """Share of the steps, at the end, over which wsd decays."""
    decay_shape: Literal["linear", "one_minus_sqrt"] = "one_minus_sqrt"
    """Shape of the decay of wsd: linear or one_minus_sqrt."""
    min_learning_rate: PositiveOrZero = 0.0001
    """Learning rate at the last step, not above learning_rate."""
    weight_decay: PositiveOrZero = 0.1
    """Weight decay of AdamW."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments."""
    max_grad_norm: Positive = 1.0
    """Norm to which larger gradients are clipped."""
    dtype: Dtype = "auto"
    """The autocast dtype: bfloat16, float16 with loss scaling, float32 or auto, bfloat16 if the
    hardware has units for it, otherwise float16 on a GPU and float32 on a CPU."""
    shuffle_shards: Count = 4
    """Shards whose rows are shuffled together."""
    log_every: Count = 1
    """Steps between points of the training curves."""
    eval_every: Count = 16
    """Steps between validations."""
    eval_rows: Count = 8
    """Validation rows per validation."""
    keep_best: bool = False
    """Whether the weights with the lowest validation loss are saved instead of the last ones; takes
    4 bytes of memory per trained parameter."""

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps, once `pipeline.config.resolved.resolve` has set it."""
        assert self.steps is not None
        return self.steps

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps={self.steps} and epochs={self.epochs} do not say how long to train: set "
                "one of the two, and the other to null"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate:g} is above learning_rate="
                f"{self.learning_rate:g}, so the rate would rise where it should decay: lower it"
            )
        if self.steps is None:  # checked again once the epochs' steps are known
            return self
        decay = round(self.decay_fraction * self.steps)
        if self.schedule == "wsd" and self.warmup_steps + decay > self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and decay_fraction={self.decay_fraction:g} of "
                f"steps={self.steps}, {decay}, overlap: lower one of them"
            )
        return self


class RunParams(Section):
    """Memory, time and messages of training; beyond rounding, no result depends on it.

    A run that was stopped may continue with other values.
    """

    head_chunk: CountOrAuto = "auto"
    """Positions whose logits are in memory at once; auto is as in capture.head_chunk."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Parallelism of several processes started by torchrun: ddp keeps a whole student on each, fsdp
    shards one over all."""
    activation_checkpointing: bool = False
    """Whether each block is computed again in the backward pass, to keep fewer activations."""
    compile: bool = False
    """Whether the blocks are compiled by torch.compile, which needs a C or C++ compiler."""
    max_skipped_steps: CountOrZero = 10
    """Steps with a non-finite loss or gradient that are skipped before the run fails; in float16,
    steps whose gradients overflow are counted apart and end the run when the loss scale falls below
    1."""
    min_retained_mass: Fraction = 0.5
    """Probability mass on the kept ids below which a warning is printed."""
    checkpoint_every: Count = 32
    """Steps between checkpoints."""
    report_to: tuple[ReportTo, ...] = ()
    """Further logs of the curves, besides DVCLive's, which the report reads: any of tensorboard,
    wandb (offline unless WANDB_MODE says otherwise) and mlflow (local unless MLFLOW_TRACKING_URI
    names a server)."""
