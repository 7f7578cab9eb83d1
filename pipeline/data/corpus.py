"""Documents in, tokens out: sources of text, deduplication, the split, and tokenization.

Three sources: `stdlib` (the Python standard library's own source files, so that a demo needs no
network), `files` (txt, jsonl, parquet) and `hub` (a streamed dataset). Whatever the source, an
exact duplicate is dropped, and whether a document is for training or validation follows from a hash
of its text: the same document lands on the same side in every run, order and machine.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config import CorpusParams
from pipeline.data.packing import pack
from pipeline.data.rows import SPLITS, SplitInfo, SplitWriter
from pipeline.errors import DecantError, ParamsError
from pipeline.model.weights import hash_tokenizer
from pipeline.runtime import import_transformers, progress_bar
from pipeline.storage import Address

_DOCUMENTS_AT_ONCE = 32
_ROWS_AT_ONCE = 256
_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
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
    tokenizer = load_tokenizer(teacher)
    end_of_document = document_separator(tokenizer)
    tokenizer_sha256 = hash_tokenizer(teacher)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    limits = {"train": params.train_tokens, "validation": params.validation_tokens}
    writers = {
        split: SplitWriter(address, split, row_length=params.row_length, vocab_size=vocab_size)
        for split in SPLITS
    }
    counters = {split: _Counter() for split in SPLITS}
    for split, writer in writers.items():
        token_lists = _tokenize(
            tokenizer,
            _chosen(params, split),
            end_of_document,
            params.max_document_tokens,
            limits[split],
            split,
            counters[split],
        )
        for rows in pack(token_lists, params.row_length, end_of_document, _ROWS_AT_ONCE):
            writer.add(rows)
        if not writer.num_tokens:
            raise DecantError(
                f"the {split} split of corpus.source={params.source} came out empty: give more or "
                f"longer documents, or change validation_fraction={params.validation_fraction:g}"
            )
    return {  # sealed together: a corpus is whole or not there
        split: writer.seal(
            num_text_bytes=counters[split].text_bytes, tokenizer_sha256=tokenizer_sha256
        )
        for split, writer in writers.items()
    }


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local Hugging Face folder."""
    if not (folder / "tokenizer.json").exists():
        raise DecantError(f"{folder} holds no tokenizer.json: run stages/fetch.py (or `dvc repro`)")
    return import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)


def document_separator(tokenizer: Any) -> int:
    """The id put after each document: <|endoftext|> where it exists, else the eos token.

    Chat models name their end of TURN as eos; in pretraining, which is what packed text resembles,
    SmolLM2 and Qwen2.5 both separated documents by <|endoftext|>.
    """
    separator = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if separator is None:
        raise DecantError("the teacher's tokenizer names no end-of-text token: set its eos_token")
    return int(separator)


class _Counter:
    text_bytes = 0


def _tokenize(
    tokenizer: Any,
    documents: Iterator[str],
    end_of_document: int,
    longest: int | None,
    limit: int | None,
    split: str,
    counter: _Counter,
) -> Iterator[list[int]]:
    """Token lists of at most `longest`, each closed by the separator, up to `limit` in all."""
    taken = 0
    with progress_bar(what=f"corpus {split}", total=limit, unit="tok") as bar:
        while texts := list(islice(documents, _DOCUMENTS_AT_ONCE)):
            # split_special_tokens: "<|endoftext|>" written in a document is text, not a command.
            encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
            for ids in encoded["input_ids"]:
                room = min(len(ids) + 1, longest or len(ids) + 1)
                if limit is not None:
                    room = min(room, limit - taken)
                tokens = [*ids, end_of_document][:room]  # a document that is cut has no end
                taken += room
                counter.text_bytes += len(tokenizer.decode(tokens[: len(ids)]).encode())
                bar.update(len(tokens))
                yield tokens
                if limit is not None and taken >= limit:
                    return


def _chosen(params: CorpusParams, split: str) -> Iterator[str]:
    """The documents of one split, exact duplicates dropped."""
    seen: set[bytes] = set()
    for text in _documents(params):
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        is_validation = int.from_bytes(digest[:8]) < params.validation_fraction * 2**64
        if is_validation == (split == "validation") and digest not in seen:
            seen.add(digest)
            yield text


def _documents(params: CorpusParams) -> Iterator[str]:
    if params.source == "stdlib":
        texts = _stdlib()
    elif params.source == "files":
        texts = _files(params.files.paths, params.files.column)
    else:
        texts = _hub(params)
    return (text for text in texts if text.strip())


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


def _files(patterns: tuple[str, ...], column: str) -> Iterator[str]:
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


def _hub(params: CorpusParams) -> Iterator[str]:
    import datasets

    hub = params.hub
    with _readable(f"dataset {hub.id} from the Hugging Face hub"):
        rows = datasets.load_dataset(
            hub.id, hub.name, split=hub.split, revision=hub.revision, streaming=True
        )
        yield from _column(rows, hub.column)


def _column(rows: Any, column: str) -> Iterator[str]:
    for row in rows:
        if column not in row:
            raise ParamsError(
                f"the corpus has no column {column!r}, only {', '.join(row)}: set the column's name"
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
