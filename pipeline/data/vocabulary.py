"""Check that a student uses the corpus's tokens: the same ids for the same pieces of text.

Teacher, corpus and student must share ids, not files. Qwen2.5 0.5B and 7B, or the base and chat
models of one family, differ in the bytes of tokenizer.json (templates, padding, how merges are
written) and in the number of embedding rows, yet every id has the same meaning in them. Therefore
vocabularies and merge rules are compared:

    ordinary ids    must be the same tokens, and the merge rules must be the same; otherwise it is
                    another tokenizer
    control tokens  (added tokens, such as <|im_start|>) may differ or be missing on one side as
                    long as the corpus does not contain them
    further ids     of the student never occur in the corpus, and are ids without teacher mass

The normalisation and splitting of text before merging are not compared: they change which of the
shared ids a text becomes, but not what the ids mean, and the trained student gets the corpus's
tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.errors import DecantError, MismatchError
from pipeline.io.files import require_regular_files
from pipeline.model.folder import hash_tokenizer

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Vocabulary:
    """The ids that a tokenizer.json defines."""

    tokens: dict[int, str]  # id -> token, control tokens included
    control: frozenset[int]  # ids of added tokens
    merges: tuple[str, ...]  # BPE's merge rules, in order; empty for other kinds


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read the vocabulary of a folder's tokenizer.json.

    Raises:
        DecantError: the file does not exist or cannot be read.
    """
    file = folder / "tokenizer.json"
    require_regular_files([file])
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model = content["model"]
        added = {entry["id"]: entry["content"] for entry in content.get("added_tokens", [])}
        tokens = _ids(model["vocab"]) | added
        merges = tuple(
            rule if isinstance(rule, str) else " ".join(rule) for rule in model.get("merges") or ()
        )
        if not all(type(number) is int for number in tokens):
            raise TypeError("an id is not an integer")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DecantError(
            f"{file} cannot be read as a tokenizer ({type(error).__name__}: {str(error)[:200]}): "
            "use the model's original file"
        ) from None
    return Vocabulary(tokens=tokens, control=frozenset(added), merges=merges)


def require_tokenizer(folder: Path, corpus: CorpusSplit) -> None:
    """Refuse a folder whose tokenizer is not the one that the corpus was made with.

    Raises:
        MismatchError: the folder has another tokenizer.
        DecantError: the folder has no tokenizer.
    """
    wanted, found = corpus.info.tokenizer_sha256, hash_tokenizer(folder)
    if found != wanted:
        raise MismatchError(
            f"{corpus.path} was tokenized with tokenizer {wanted[:12]}, {folder} holds "
            f"{found[:12]}: run stages/corpus.py again, or restore the other teacher"
        )


def tokenizer_folder(folders: Iterable[Path | None], corpus: CorpusSplit) -> Path | None:
    """Return the first folder with the corpus's tokenizer; None if no folder has any tokenizer.

    Raises:
        MismatchError: the folders only have other tokenizers.
    """
    found = [f for f in folders if f is not None and (f / "tokenizer.json").exists()]
    for folder in found:
        if hash_tokenizer(folder) == corpus.info.tokenizer_sha256:
            return folder
    if found:
        require_tokenizer(found[0], corpus)
    return None


def require_shared_ids(start: Path, corpora: Sequence[CorpusSplit], tokenizer: Path) -> None:
    """Refuse a student whose ids have other meanings than the corpus's.

    Args:
        start: folder of the model that the student starts from.
        corpora: splits made with one tokenizer.
        tokenizer: folder that should hold that tokenizer; it is read only if the hashes differ.

    Raises:
        MismatchError: the ids differ; the message names the first one.
        DecantError: there is no tokenizer to compare.
    """
    _require_tokenizer_file(start, "the corpus's")
    wanted = corpora[0].info.tokenizer_sha256
    found = hash_tokenizer(start)
    if found == wanted:
        return
    if not (tokenizer / "tokenizer.json").exists() or hash_tokenizer(tokenizer) != wanted:
        raise MismatchError(
            f"{start} has tokenizer {found[:12]}, the corpus was made by {wanted[:12]}, which "
            f"{tokenizer} does not hold for a comparison of their ids: restore that teacher, or "
            "make the corpus again with stages/corpus.py"
        )
    ours, theirs = read_vocabulary(start), read_vocabulary(tokenizer)
    differing = [
        number
        for number in range(corpora[0].info.vocab_size)
        if ours.tokens.get(number) != theirs.tokens.get(number)
    ]
    control = ours.control | theirs.control
    wrong = [number for number in differing if number not in control]
    if not wrong and differing:
        wrong = sorted(_occurring(corpora, differing))
    if wrong:
        raise MismatchError(_sentence(start, wrong, ours, theirs))
    if ours.merges != theirs.merges:
        raise MismatchError(
            f"{start} has the corpus's token ids, but its tokenizer merges by other rules from "
            f"rule {_first_difference(ours.merges, theirs.merges):,} on: choose a student of the "
            "teacher's family"
        )


def require_same_vocabulary(folder: Path, teacher: Path) -> None:
    """Refuse a model of which an id has another meaning than in the teacher's tokenizer.

    Ids that only one of them has, such as control tokens added later, are allowed.

    Raises:
        MismatchError: the ids differ; the message names the first one.
        DecantError: there is no tokenizer to compare.
    """
    _require_tokenizer_file(folder, "the teacher's")
    if hash_tokenizer(folder) == hash_tokenizer(teacher):
        return
    ours, theirs = read_vocabulary(folder).tokens, read_vocabulary(teacher).tokens
    wrong = sorted(n for n in ours.keys() & theirs.keys() if ours[n] != theirs[n])
    if wrong:
        raise MismatchError(
            f"{folder} has another vocabulary than the teacher: id {wrong[0]} is "
            f"{ours[wrong[0]]!r} there and {theirs[wrong[0]]!r} in {teacher}, and "
            f"{len(wrong) - 1:,} more differ: choose a model of the teacher's family"
        )


def _require_tokenizer_file(folder: Path, whose: str) -> None:
    if not (folder / "tokenizer.json").exists():
        raise DecantError(
            f"{folder} holds no tokenizer.json, so nothing says that its ids are {whose}: put "
            "the model's own there"
        )


def _sentence(start: Path, wrong: list[int], ours: Vocabulary, theirs: Vocabulary) -> str:
    first = wrong[0]
    return (
        f"{start} has another vocabulary than the corpus: id {first} is "
        f"{ours.tokens.get(first)!r} there and {theirs.tokens.get(first)!r} in the corpus, and "
        f"{len(wrong) - 1:,} more differ: choose a student of the teacher's family, or a teacher "
        "with the student's tokenizer"
    )


def _ids(vocab: Any) -> dict[int, str]:
    """Return the tokens by id.

    BPE, WordPiece and WordLevel map tokens to ids; Unigram lists [token, score] in order of id.
    """
    if isinstance(vocab, dict):
        return {number: token for token, number in vocab.items()}
    return {number: token for number, (token, _) in enumerate(vocab)}


def _occurring(corpora: Iterable[CorpusSplit], numbers: list[int]) -> set[int]:
    """Return those of the ids that occur in some row."""
    wanted = np.array(numbers)
    found: set[int] = set()
    for corpus in corpora:
        for start in range(0, len(corpus), _ROWS_AT_ONCE):
            rows = corpus.rows(start, min(start + _ROWS_AT_ONCE, len(corpus)))
            found.update(wanted[np.isin(wanted, rows.tokens)].tolist())
    return found


def _first_difference(one: Sequence[str], two: Sequence[str]) -> int:
    pairs = zip(one, two, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))
