"""Documents in, tokens out: sources of text, deduplication, the split, and tokenization.

Three sources: `stdlib` (the Python standard library's own source files, so that a demo needs no
network), `files` (txt, jsonl, parquet) and `hub` (a streamed dataset). A document is a text, or,
where the column holds lists of messages, a conversation (pipeline/data/chat.py). Whatever the
source, an exact duplicate is dropped, and whether a document is for training or validation follows
from a hash of its text: the same document lands on the same side in every run, order and machine.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import CorpusParams
from pipeline.data.chat import ChatTokenizer, Message
from pipeline.data.packing import PACKERS, Document
from pipeline.data.rows import SPLITS, SplitInfo, SplitWriter
from pipeline.errors import DecantError, ParamsError
from pipeline.model.config import embedding_rows
from pipeline.model.folder import hash_tokenizer
from pipeline.model.tokenizer import load_tokenizer
from pipeline.runtime.console import announce, progress_bar
from pipeline.storage import Address

_DOCUMENTS_AT_ONCE = 32
_ROWS_AT_ONCE = {"cut": 256, "fit": 1024}  # in memory; the larger the buffer, the better the fit
_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
Source = str | list[Message]
_NOT_OURS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "ensurepip", "_vendor"}


def build_corpus(params: CorpusParams, teacher: Path, address: Address) -> dict[str, SplitInfo]:
    """Tokenize, split and pack a corpus into the zarr group at `address`.

    Args:
        teacher: folder whose tokenizer is used.

    Returns:
        What each split holds.

    Raises:
        DecantError: a split came out empty, or the source cannot be read.
    """
    limits = {"train": params.train_tokens, "validation": params.validation_tokens}
    sizes = " and ".join(
        f"all tokens for {split}" if limit is None else f"up to {limit:,} tokens for {split}"
        for split, limit in limits.items()
    )
    announce(
        "corpus", f"cuts corpus.source={params.source} into rows of {params.row_length}, {sizes}"
    )
    tokenizer = load_tokenizer(teacher)
    tokenizer_sha256 = hash_tokenizer(teacher)
    to_documents = DocumentTokenizer(tokenizer, completions_only=params.loss_on == "completions")
    vocab_size = num_ids(tokenizer, teacher)
    writers = {
        split: SplitWriter(address, split, row_length=params.row_length, vocab_size=vocab_size)
        for split in SPLITS
    }
    counters = {split: _Counter() for split in SPLITS}
    pack, at_once = PACKERS[params.packing], _ROWS_AT_ONCE[params.packing]
    for split, writer in writers.items():
        documents = _taken(
            to_documents,
            _chosen(params, split),
            params.max_document_tokens,
            limits[split],
            split,
            counters[split],
        )
        for rows in pack(documents, params.row_length, to_documents.separator, at_once):
            _require_rows(teacher, int(rows.tokens.max()), vocab_size, tokenizer)
            writer.add(rows)
        if not writer.num_tokens:
            raise DecantError(_came_out_empty(params, split, counters[split]))
    return {  # sealed together: a corpus is whole or not there
        split: writer.seal(
            num_text_bytes=counters[split].text_bytes,
            num_dropped=counters[split].dropped,
            tokenizer_sha256=tokenizer_sha256,
        )
        for split, writer in writers.items()
    }


def _came_out_empty(params: CorpusParams, split: str, counter: _Counter) -> str:
    sentence = f"the {split} split of corpus.source={params.source} came out empty"
    if counter.dropped:
        return (
            f"{sentence}, since none of its {counter.dropped} conversations has an assistant's turn"
            " in the loss: give others, or set corpus.loss_on=all or a larger max_document_tokens"
        )
    return (
        f"{sentence}: give more or longer documents, or change validation_fraction="
        f"{params.validation_fraction:g}"
    )


def num_ids(tokenizer: Any, teacher: Path) -> int:
    """Ids that a corpus may hold: those of the tokenizer for which the teacher has a row.

    Some tokenizers have a few more, for example Gemma 3's <image_soft_token>, for which the text
    models have no row. A corpus without them is one that the teacher can read.
    """
    largest = max(tokenizer.get_vocab().values())
    rows = embedding_rows(teacher)
    return int(largest) + 1 if rows is None else min(int(largest) + 1, rows)


def _require_rows(teacher: Path, largest: int, vocab_size: int, tokenizer: Any) -> None:
    if largest >= vocab_size:
        raise DecantError(
            f"the corpus holds id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and "
            f"{teacher} has {vocab_size} embedding rows: leave out the documents that hold it, or "
            "choose a teacher that has a row for it"
        )


def document_separator(tokenizer: Any) -> int:
    """The id put after each document: <|endoftext|> where it exists, else the eos token.

    Chat models name their end of TURN as eos; in pretraining, which is what packed text resembles,
    SmolLM2 and Qwen2.5 both separated documents by <|endoftext|>.
    """
    separator = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if separator is None:
        raise DecantError("the teacher's tokenizer names no end-of-text token: set its eos_token")
    return int(separator)


class DocumentTokenizer:
    """Texts and conversations to documents.

    Args:
        tokenizer: Hugging Face's, a fast one.
        completions_only: put only the assistant's turns into the loss; refuses texts.
    """

    def __init__(self, tokenizer: Any, *, completions_only: bool) -> None:
        self.tokenizer = tokenizer
        self.separator = document_separator(tokenizer)
        self._completions_only = completions_only

    def __call__(self, sources: Iterator[Source]) -> Iterator[Document]:
        """Tokenize in order, several texts at once.

        A text is closed by the separator; a conversation is what its template makes of it, which
        ends each turn itself.
        """
        while block := list(islice(sources, _DOCUMENTS_AT_ONCE)):
            for are_texts, group in groupby(block, key=lambda source: isinstance(source, str)):
                found: list[Any] = list(group)
                yield from self._texts(found) if are_texts else map(self._chat, found)

    @cached_property
    def _chat(self) -> ChatTokenizer:
        return ChatTokenizer(self.tokenizer, completions_only=self._completions_only)

    def _texts(self, texts: list[str]) -> Iterator[Document]:
        if self._completions_only:
            raise ParamsError(
                f"corpus.loss_on=completions needs conversations, and the corpus holds text "
                f"({texts[0][:40]!r}...): set it to all, or name a column of messages"
            )
        # split_special_tokens: "<|endoftext|>" written in a document is text, not a command.
        encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        for ids in encoded["input_ids"]:
            tokens = np.array([*ids, self.separator], dtype=np.int64)
            yield Document(tokens, np.ones(len(tokens), dtype=np.bool_))


class _Counter:
    text_bytes = 0
    dropped = 0


def _taken(
    to_documents: DocumentTokenizer,
    sources: Iterator[Source],
    longest: int | None,
    limit: int | None,
    split: str,
    counter: _Counter,
) -> Iterator[Document]:
    """Documents cut at `longest` tokens, without those out of the loss, up to `limit` tokens."""
    taken = 0
    with progress_bar(what=f"corpus {split}", total=limit, unit="tok") as bar:
        for whole in to_documents(sources):
            room = longest or len(whole)
            if limit is not None:
                room = min(room, limit - taken)
            document = whole[:room]  # one that is cut has no end
            if not document.in_loss.any():
                counter.dropped += 1
                continue
            taken += len(document)
            counter.text_bytes += _text_bytes(document, to_documents)
            bar.update(len(document))
            yield document
            if limit is not None and taken >= limit:
                return


def _text_bytes(document: Document, to_documents: DocumentTokenizer) -> int:
    """UTF-8 bytes of a document without the separator that closes it."""
    tokens = document.tokens
    if tokens[-1] == to_documents.separator:
        tokens = tokens[:-1]
    return len(to_documents.tokenizer.decode(tokens).encode())


def _chosen(params: CorpusParams, split: str) -> Iterator[Source]:
    """The documents of one split, exact duplicates dropped."""
    seen: set[bytes] = set()
    for source in _documents(params):
        text = source if isinstance(source, str) else _canonical(source)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        is_validation = int.from_bytes(digest[:8]) < params.validation_fraction * 2**64
        if is_validation == (split == "validation") and digest not in seen:
            seen.add(digest)
            yield source


def _canonical(messages: list[Message]) -> str:
    """One text for one conversation, whatever the order of its keys."""
    return json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)


def _documents(params: CorpusParams) -> Iterator[Source]:
    if params.source == "stdlib":
        sources: Iterator[Source] = _stdlib()
    elif params.source == "files":
        sources = _files(params.files.paths, params.files.column)
    else:
        sources = _hub(params)
    return (source for source in sources if not isinstance(source, str) or source.strip())


def _stdlib() -> Iterator[str]:
    """Source files of the running Python's standard library, in an order mixed by path hash."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _NOT_OURS)
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    for file in sorted(files, key=lambda file: _mix(file.relative_to(root).as_posix())):
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful declare another encoding


def _mix(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _files(patterns: tuple[str, ...], column: str) -> Iterator[Source]:
    import datasets

    files = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DecantError(f"corpus.files.paths: nothing matches {pattern!r}")
        files += matches
    kinds = {Path(file).suffix for file in files}
    if len(kinds) != 1 or not kinds <= _BUILDERS.keys():
        raise ParamsError(
            f"corpus.files.paths holds {', '.join(sorted(kinds))}: give files of one kind out of "
            f"{', '.join(_BUILDERS)}"
        )
    builder = _BUILDERS[kinds.pop()]
    options = {"sample_by": "document"} if builder == "text" else {}
    with _readable("corpus.files.paths"):
        rows = datasets.load_dataset(
            builder, data_files=files, split="train", streaming=True, **options
        )
        yield from _column(rows, "text" if builder == "text" else column)


def _hub(params: CorpusParams) -> Iterator[Source]:
    import datasets

    hub = params.hub
    with _readable(f"dataset {hub.id} from the Hugging Face hub"):
        rows = datasets.load_dataset(
            hub.id, hub.name, split=hub.split, revision=hub.revision, streaming=True
        )
        yield from _column(rows, hub.column)


def _column(rows: Any, column: str) -> Iterator[Source]:
    for row in rows:
        if column not in row:
            raise ParamsError(
                f"the corpus has no column {column!r}, only {', '.join(row)}: set the column's name"
            )
        if not isinstance(row[column], str | list | None):
            raise ParamsError(
                f"the corpus's column {column!r} holds {str(row[column])[:40]!r}, neither text nor "
                "a list of messages: set the column's name"
            )
        if row[column]:
            yield row[column]


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn whatever a reader of files or of the hub raises into one sentence."""
    try:
        yield
    except DecantError:
        raise
    except Exception as error:  # `datasets` lets errors of many libraries through
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DecantError(
            f"{what} cannot be read ({reason}): check the name, the file or the connection"
        ) from error
