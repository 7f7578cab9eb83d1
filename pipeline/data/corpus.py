"""Turn documents into a corpus: tokenization, deduplication, the split, and packing.

A document (pipeline/data/sources.py) is a text or, if the column holds lists of messages, a
conversation (pipeline/data/chat.py). The sources are read once, and divided and mixed by
pipeline/data/mixture.py. Exact duplicates are dropped whatever the source. Documents that cannot be
used are left out and reported, up to corpus.max_bad_documents of them.

Memory is bounded however large the corpus is, and its bytes do not depend on the number of
processes that tokenize it (pipeline/data/tokenizer_pool.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tqdm import tqdm

from pipeline.config.source_params import CorpusParams
from pipeline.data.corpus_writer import SplitWriter
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit, SplitInfo
from pipeline.data.document_tokenizer import (
    DocumentTokenizer,
    TokenizerSettings,
    leading_tokens,
)
from pipeline.data.mixture import Fault, Mixture, Read, source_name, weight_of
from pipeline.data.packing import PACKERS, Document, Rows
from pipeline.data.seen_documents import SeenDocuments
from pipeline.data.tokenizer_pool import LocalPool, TokenizerPool, ray_pool
from pipeline.errors import DecantError, MismatchError
from pipeline.io.address import Address
from pipeline.io.folders import open_folder
from pipeline.model.config_json import embedding_rows
from pipeline.model.folder import POINTER, hash_tokenizer
from pipeline.model.tokenizer import load_tokenizer
from pipeline.runtime.console import announce, progress_bar, readable_bytes, say

_ROWS_AT_ONCE = {
    "concat": 256,
    "best_fit": 1024,
}  # in memory; the larger the buffer, the better the fit
_BAD_SHOWN = 20


def build_corpus(
    params: CorpusParams,
    teacher: Path,
    address: Address,
    *,
    workers: int | None = 1,
    on_ray: bool = False,
    append: bool = False,
    before_commit: Callable[[], None] | None = None,
) -> dict[str, SplitInfo]:
    """Tokenize, split and pack a corpus into the zarr group at `address`.

    At the end it prints what was left out, and which parameter caused that.

    Args:
        teacher: folder of the teacher, which holds the tokenizer.
        workers: processes that tokenize a large corpus, on this machine; on Ray, the tasks in
            flight, where None means two per core.
        on_ray: tokenize on the Ray cluster that RAY_ADDRESS names.
        append: keep the rows of the corpus at `address`, and add rows of the documents that it does
            not have; a split without new documents stays as it is.
        before_commit: called when all rows are made, before the corpus at `address` changes.

    Returns:
        The description of each split.

    Raises:
        DecantError: a split is empty, the source cannot be read, or too many of its documents
            cannot be used.
    """
    limits = _limits(params)
    sizes = " and ".join(
        f"all tokens for {split}" if limit is None else f"up to {limit:,} tokens for {split}"
        for split, limit in limits.items()
    )
    into = f"rows of {params.row_length}, {sizes}"
    announce(
        "corpus",
        f"adds what is new in {params.named} to {address}, in {into}"
        if append
        else f"cuts {params.named} into {into}",
    )
    tokenizer = load_tokenizer(teacher)
    settings = TokenizerSettings(
        teacher=teacher.absolute(),
        sha256=hash_tokenizer(teacher),
        version=tokenizers.__version__,
        completions_only=params.loss_on == "completions",
        add_bos=params.add_bos,
        longest=_longest(params),
        max_document_tokens=params.max_document_tokens,
    )
    to_documents = DocumentTokenizer(tokenizer, settings)
    bad = _BadDocuments(params.max_bad_documents)
    vocab_size = num_ids(tokenizer, teacher)
    there = {split: CorpusSplit(address, split) for split in SPLITS} if append else {}
    for found in there.values():
        _require_same_tokens(found, settings.sha256, vocab_size, to_documents.leading)
    writers = {
        split: SplitWriter(
            address,
            split,
            row_length=params.row_length,
            vocab_size=vocab_size,
            onto=there.get(split),
        )
        for split in SPLITS
    }
    totals = [limit - writers[split].num_tokens for split, limit in limits.items() if limit]
    total = max(0, sum(totals)) if len(totals) == len(SPLITS) else None
    pool: AbstractContextManager[TokenizerPool] = (
        ray_pool(settings, workers) if on_ray else LocalPool(to_documents, settings, workers or 1)
    )
    with (
        pool as tokenize,
        SeenDocuments() as seen,
        progress_bar(what="corpus", total=total, unit="tok") as bar,
    ):
        for found in there.values():
            for digest in found.digests():
                seen.add(digest)
        mixture = Mixture(params, tokenize, seen, bad.add)
        splits = {
            split: _Split(params, split, writer, to_documents, mixture, seen, bad, bar)
            for split, writer in writers.items()
        }
        for split, rows in _packed(params, splits, mixture, to_documents.separator):
            _require_rows(teacher, int(rows.tokens.max()), vocab_size, tokenizer)
            writers[split].add(rows)
    for split, writer in writers.items():
        if not writer.num_tokens:
            raise DecantError(_came_out_empty(params, splits[split], mixture, bad))
    if not append:  # the corpus is another one; a killed process must not leave the older record
        open_folder(address).remove(POINTER)
    writers = {split: writer for split, writer in writers.items() if writer.num_new_rows}
    if before_commit and writers:
        before_commit()
    infos = {split: found.info for split, found in there.items()}
    infos |= {  # committed together, so that a corpus is complete or does not exist
        split: writer.commit(
            num_text_bytes=splits[split].text_bytes,
            num_dropped=splits[split].dropped,
            tokenizer_sha256=settings.sha256,
            leading_ids=tuple(to_documents.leading),
        )
        for split, writer in writers.items()
    }
    num_texts = sum(split.texts for split in splits.values())
    begins = _begins(tokenizer, to_documents.leading, params.add_bos) if num_texts else ()
    for line in (*begins, *_left_out(params, splits, mixture, append=append), *bad.lines()):
        say(f"corpus: {line}")
    return infos


def _limits(params: CorpusParams) -> dict[str, int | None]:
    """Return the maximum number of tokens of each split; None takes all."""
    return {"train": params.train_tokens, "validation": params.validation_tokens}


def _packed(
    params: CorpusParams, splits: dict[str, _Split], mixture: Mixture, separator: int
) -> Iterator[tuple[str, Rows]]:
    """Yield blocks of rows of either split, so that few documents of the other one wait."""
    at_once = _ROWS_AT_ONCE[params.packing]
    pack, block = PACKERS[params.packing], at_once * params.row_length
    larger_first = SPLITS if params.validation_fraction <= 0.5 else SPLITS[::-1]
    packers = {
        name: pack(splits[name].documents(), params.row_length, separator, at_once)
        for name in larger_first
    }
    while packers:
        fullest = max(packers, key=mixture.num_waiting)
        name = fullest if mixture.num_waiting(fullest) >= block else next(iter(packers))
        rows = next(packers[name], None)
        if rows is None:
            del packers[name]
        else:
            yield name, rows


def _longest(params: CorpusParams) -> int | None:
    """Return the maximum number of tokens kept from any document; None if there is no limit."""
    limits = [params.max_document_tokens]
    if params.train_tokens is not None:
        limits.append(max(params.train_tokens, params.validation_tokens))
    return min((limit for limit in limits if limit is not None), default=None)


def _begins(tokenizer: Any, leading: list[int], add_bos: Literal["auto"] | bool) -> Iterator[str]:
    """Yield how texts begin, and whether prompts will begin otherwise."""
    usual = leading_tokens(tokenizer, "auto")

    def names(ids: list[int]) -> str:
        return " ".join(tokenizer.convert_ids_to_tokens(ids)) or "no BOS token"

    yield f"texts begin with {names(leading)} (corpus.add_bos={str(add_bos).lower()})"
    if leading != usual:
        yield (
            f"warning: the tokenizer begins texts with {names(usual)}, and so do prompts of "
            "generate, humaneval and other programs: a student of this corpus has not seen that, "
            "unless corpus.add_bos=auto"
        )


def _require_same_tokens(
    found: CorpusSplit, tokenizer_sha256: str, vocab_size: int, leading: list[int]
) -> None:
    """Refuse to add rows to a split whose rows were made with another tokenizer."""
    wanted = {
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "leading_ids": tuple(leading),
    }
    for name, value in wanted.items():
        if (has := getattr(found.info, name)) != value:
            raise MismatchError(
                f"{found.path} has {name}={has}, and the teacher's tokenizer makes {value}, so no "
                "rows can be added: restore the other teacher, or rebuild the corpus by "
                "stages/corpus.py --overwrite"
            )


def _came_out_empty(
    params: CorpusParams, split: _Split, mixture: Mixture, bad: _BadDocuments
) -> str:
    sentence = f"the {split.name} split of {params.named} came out empty"
    if split.dropped:
        return (
            f"{sentence}, since none of its {split.dropped} conversations has an assistant's turn"
            " in the loss: give others, or set corpus.loss_on=all or a larger max_document_tokens"
        )
    if params.sources:
        source = mixture.sources[mixture.ended_by[split.name]]
        sentence += f", since {source_name(source)} has no document for it"
    if bad.found:
        return f"{sentence}, and {bad.summary()}"
    return (
        f"{sentence}: give more or longer documents, or change validation_fraction="
        f"{params.validation_fraction:g}"
    )


def _left_out(
    params: CorpusParams, splits: dict[str, _Split], mixture: Mixture, *, append: bool
) -> Iterator[str]:
    """Yield a line about each part of the source that is left out, with the parameter's name."""
    for name, split in splits.items():
        if len(mixture.sources) > 1:
            yield from _shares(name, mixture, append=append)
        if split.full_at is not None and not split.read:
            yield f"{name} is full at corpus.{name}_tokens={split.limit:,}: nothing is added to it"
        elif split.full_at is not None:
            total = mixture.extents[0].total_bytes if len(mixture.sources) == 1 else None
            place = (
                f", {readable_bytes(split.full_at)} into the source's {readable_bytes(total)}"
                if total
                else ""
            )
            yield (
                f"{name} is full at corpus.{name}_tokens={split.limit:,} "
                f"after {split.read:,} documents{place}; those that follow are left out of it"
            )
        if split.cut:
            share = 1.0 - split.kept_characters / max(split.characters, 1)
            yield (
                f"{split.cut:,} of {split.read:,} documents of {name} are cut at "
                f"corpus.max_document_tokens={params.max_document_tokens:,}, which leaves out "
                f"{share:.1%} of the text of {name}"
            )
        if split.duplicates:
            known = "documents that it has already, or twice," if append else "exact duplicates"
            yield f"{split.duplicates:,} {known} are left out of {name}"


def _shares(name: str, mixture: Mixture, *, append: bool) -> Iterator[str]:
    """Yield the share of a split's tokens that each source has, and which source ended it."""
    tokens = mixture.tokens[name]
    if total := sum(tokens):
        shares = ", ".join(
            f"{number / total:.1%} from {source_name(source)} (weight {weight_of(source):g})"
            for number, source in zip(tokens, mixture.sources, strict=True)
        )
        yield f"of the {total:,} {'new ' if append else ''}tokens of {name} come {shares}"
    if name in mixture.ended_by:
        last = source_name(mixture.sources[mixture.ended_by[name]])
        yield f"{name} ends where {last} has no more documents; those of the others are left out"


def num_ids(tokenizer: Any, teacher: Path) -> int:
    """Return the number of ids a corpus may hold: tokenizer ids for which the teacher has a row.

    Some tokenizers have a few more, for example Gemma 3's <image_soft_token>, for which the text
    models have no row. The teacher can read a corpus that does not contain them.
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


class _BadDocuments:
    """The documents that cannot be used, each with its place and the reason.

    Raises:
        DecantError: raised by `add` if there are more than `limit`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.found: dict[str, str] = {}

    def add(self, fault: Fault) -> None:
        self.found[fault.place] = fault.reason
        if len(self.found) > self._limit:
            raise DecantError(
                f"{self.summary()}; these are more than corpus.max_bad_documents={self._limit}: "
                "correct or drop them, or raise it"
            )

    def summary(self) -> str:
        place, reason = next(iter(self.found.items()))
        count = len(self.found)
        several = "1 document" if count == 1 else f"{count:,} documents"
        first = "" if count == 1 else "the first "
        return f"{several} cannot be used, {first}{place}: {reason}"

    def lines(self) -> Iterator[str]:
        if self.found:
            yield f"{len(self.found):,} documents cannot be used and are left out:"
        for place, reason in list(self.found.items())[:_BAD_SHOWN]:
            yield f"  {place}: {reason}"


@dataclass
class _Split:
    """The documents of one split, and counts of what happened to them."""

    params: CorpusParams
    name: str
    writer: SplitWriter
    tokenizer: DocumentTokenizer
    mixture: Mixture
    seen: SeenDocuments
    bad: _BadDocuments
    bar: tqdm[Any]
    read: int = 0
    texts: int = 0  # not conversations
    duplicates: int = 0
    dropped: int = 0
    cut: int = 0  # by max_document_tokens
    characters: int = 0
    kept_characters: int = 0
    text_bytes: int = 0
    full_at: int | None = None  # bytes of the source when the split was full

    @property
    def limit(self) -> int | None:
        """Tokens at which the split is full."""
        return _limits(self.params)[self.name]

    def documents(self) -> Iterator[Document]:
        """Yield documents cut to their limit, up to the split's limit, without duplicates."""
        limit, taken = self.limit, self.writer.num_tokens
        if limit is not None and taken >= limit:
            self.full_at = 0
            self.mixture.close(self.name)
            return
        for source, read in self.mixture.documents(self.name):
            document = self._document(read, None if limit is None else limit - taken)
            if document is None:
                continue
            taken += len(document)
            self.mixture.tokens[self.name][source] += len(document)
            self.bar.update(len(document))
            yield document
            if limit is not None and taken >= limit:
                self.full_at = read.position
                break
        self.mixture.close(self.name)

    def _document(self, read: Read, room: int | None) -> Document | None:
        """Return a document cut to its limit; None for those that are left out."""
        if not self.seen.add(read.digest):
            self.duplicates += 1
            return None
        if isinstance(read.result, DecantError):
            raise read.result
        if isinstance(read.result, str):
            self.bad.add(Fault(read.place, read.result))
            return None
        tokenized = read.result
        assert tokenized is not None
        whole = tokenized.document
        longest = self.params.max_document_tokens or len(whole)
        document = whole[: longest if room is None else min(longest, room)]
        self.read += 1
        self.writer.saw(read.digest)
        self.texts += read.is_text
        if not document.in_loss.any():
            self.dropped += 1
            return None
        kept_bytes, kept_characters = tokenized.num_kept_bytes, tokenized.num_kept_characters
        if len(document) < min(longest, len(whole)):  # the last one is cut where the split is full
            text = self.tokenizer.text_of(document.tokens)
            kept_bytes = len(text.encode())
            kept_characters = min(len(text), tokenized.num_characters)
        self.text_bytes += kept_bytes
        self.characters += tokenized.num_characters
        self.kept_characters += kept_characters
        self.cut += len(whole) > longest
        return document
