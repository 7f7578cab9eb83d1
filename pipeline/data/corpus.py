"""Turn documents into tokens: deduplication, the split, and tokenization.

A document (pipeline/data/sources.py) is a text or, if the column holds lists of messages, a
conversation (pipeline/data/chat.py). Exact duplicates are dropped whatever the source. A hash of a
document's text decides whether it is for training or validation, so the same document is on the
same side in every run, order and machine. Documents that cannot be used are left out and reported,
up to corpus.max_bad_documents of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.config.source_params import CorpusParams
from pipeline.data.chat import BadConversationError, ChatTokenizer, Message
from pipeline.data.corpus_writer import SplitWriter
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit, SplitInfo
from pipeline.data.packing import PACKERS, Document
from pipeline.data.prefix import PrefixEncoder
from pipeline.data.sources import Extent, Source, read_documents
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.io.address import Address
from pipeline.io.folders import open_folder
from pipeline.model.config_json import embedding_rows
from pipeline.model.folder import POINTER, hash_tokenizer
from pipeline.model.tokenizer import load_tokenizer
from pipeline.runtime.console import announce, progress_bar, readable_bytes, say

_DOCUMENTS_AT_ONCE = 32
_CHARACTERS_AT_ONCE = 2**20  # limit for documents that are tokenized together
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
    append: bool = False,
    before_commit: Callable[[], None] | None = None,
) -> dict[str, SplitInfo]:
    """Tokenize, split and pack a corpus into the zarr group at `address`.

    At the end it prints what was left out, and which parameter caused that.

    Args:
        teacher: folder of the teacher, which holds the tokenizer.
        append: keep the rows of the corpus at `address`, and add rows of the documents that it does
            not have; a split without new documents stays as it is.
        before_commit: called when all rows are made, before the corpus at `address` changes.

    Returns:
        The description of each split.

    Raises:
        DecantError: a split is empty, the source cannot be read, or too many of its documents
            cannot be used.
    """
    limits = {"train": params.train_tokens, "validation": params.validation_tokens}
    sizes = " and ".join(
        f"all tokens for {split}" if limit is None else f"up to {limit:,} tokens for {split}"
        for split, limit in limits.items()
    )
    into = f"rows of {params.row_length}, {sizes}"
    announce(
        "corpus",
        f"adds what is new in corpus.source={params.source} to {address}, in {into}"
        if append
        else f"cuts corpus.source={params.source} into {into}",
    )
    tokenizer = load_tokenizer(teacher)
    tokenizer_sha256 = hash_tokenizer(teacher)
    bad = _BadDocuments(params.max_bad_documents)
    to_documents = DocumentTokenizer(
        tokenizer,
        completions_only=params.loss_on == "completions",
        add_bos=params.add_bos,
        longest=_longest(params),
        bad=bad,
    )
    vocab_size = num_ids(tokenizer, teacher)
    there = {split: CorpusSplit(address, split) if append else None for split in SPLITS}
    for found in there.values():
        if found:
            _require_same_tokens(found, tokenizer_sha256, vocab_size, to_documents.leading)
    writers = {
        split: SplitWriter(
            address, split, row_length=params.row_length, vocab_size=vocab_size, onto=there[split]
        )
        for split in SPLITS
    }
    counters = {split: _Counter() for split in SPLITS}
    pack, at_once = PACKERS[params.packing], _ROWS_AT_ONCE[params.packing]
    for split, writer in writers.items():
        known = found.digests() if (found := there[split]) else ()
        sources = _chosen(params, split, counters[split], bad, known)
        documents = _taken(to_documents, sources, params, split, counters[split], writer)
        for rows in pack(documents, params.row_length, to_documents.separator, at_once):
            _require_rows(teacher, int(rows.tokens.max()), vocab_size, tokenizer)
            writer.add(rows)
        if not writer.num_tokens:
            raise DecantError(_came_out_empty(params, split, counters[split], bad))
    if not append:  # the corpus is another one; a killed process must not leave the older record
        open_folder(address).remove(POINTER)
    writers = {split: writer for split, writer in writers.items() if writer.num_new_rows}
    if before_commit and writers:
        before_commit()
    infos = {split: found.info for split, found in there.items() if found}
    infos |= {  # committed together, so that a corpus is complete or does not exist
        split: writer.commit(
            num_text_bytes=counters[split].text_bytes,
            num_dropped=counters[split].dropped,
            tokenizer_sha256=tokenizer_sha256,
            leading_ids=tuple(to_documents.leading),
        )
        for split, writer in writers.items()
    }
    begins = _begins(tokenizer, to_documents, params.add_bos)
    for line in (*begins, *_left_out(params, counters, append=append), *bad.lines()):
        say(f"corpus: {line}")
    return infos


def _longest(params: CorpusParams) -> int | None:
    """Return the maximum number of tokens kept from any document; None if there is no limit."""
    limits = [params.max_document_tokens]
    if params.train_tokens is not None:
        limits.append(max(params.train_tokens, params.validation_tokens))
    return min((limit for limit in limits if limit is not None), default=None)


def _begins(
    tokenizer: Any, to_documents: DocumentTokenizer, add_bos: Literal["auto"] | bool
) -> Iterator[str]:
    """Yield how texts begin, if there are any, and whether prompts will begin otherwise."""
    if not to_documents.num_texts:
        return
    leading, usual = to_documents.leading, leading_tokens(tokenizer, "auto")

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


def _came_out_empty(params: CorpusParams, split: str, counter: _Counter, bad: _BadDocuments) -> str:
    sentence = f"the {split} split of corpus.source={params.source} came out empty"
    if counter.dropped:
        return (
            f"{sentence}, since none of its {counter.dropped} conversations has an assistant's turn"
            " in the loss: give others, or set corpus.loss_on=all or a larger max_document_tokens"
        )
    if bad.found:
        return f"{sentence}, and {bad.summary()}"
    return (
        f"{sentence}: give more or longer documents, or change validation_fraction="
        f"{params.validation_fraction:g}"
    )


def _left_out(
    params: CorpusParams, counters: dict[str, _Counter], *, append: bool
) -> Iterator[str]:
    """Yield a line about each part of the source that is left out, with the parameter's name."""
    for split, counter in counters.items():
        if counter.full_at is not None and not counter.read:
            yield (
                f"{split} is full at corpus.{split}_tokens={getattr(params, f'{split}_tokens'):,}: "
                "nothing is added to it"
            )
        elif counter.full_at is not None:
            total = counter.extent.total_bytes
            place = (
                f", {readable_bytes(counter.full_at)} into the source's {readable_bytes(total)}"
                if total
                else ""
            )
            yield (
                f"{split} is full at corpus.{split}_tokens={getattr(params, f'{split}_tokens'):,} "
                f"after {counter.read:,} documents{place}; those that follow are left out of it"
            )
        if counter.cut:
            share = 1.0 - counter.kept_characters / max(counter.characters, 1)
            yield (
                f"{counter.cut:,} of {counter.read:,} documents of {split} are cut at "
                f"corpus.max_document_tokens={params.max_document_tokens:,}, which leaves out "
                f"{share:.1%} of the text of {split}"
            )
        if counter.duplicates:
            known = "documents that it has already, or twice," if append else "exact duplicates"
            yield f"{counter.duplicates:,} {known} are left out of {split}"


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


def document_separator(tokenizer: Any) -> int:
    """Return the id put after each document: <|endoftext|> if it exists, else the eos token.

    In chat models the eos token marks the end of a TURN. In pretraining, which packed text
    resembles, SmolLM2 and Qwen2.5 both separated documents by <|endoftext|>.
    """
    separator = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if separator is None:
        raise DecantError("the teacher's tokenizer names no end-of-text token: set its eos_token")
    return int(separator)


def leading_tokens(tokenizer: Any, add_bos: Literal["auto"] | bool) -> list[int]:
    """Return the ids that precede each text; with `auto` those that the tokenizer itself adds.

    Raises:
        ParamsError: a BOS token is requested, and the tokenizer names none.
    """
    if add_bos is False:
        return []
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if start and whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    if add_bos == "auto":
        return []
    if tokenizer.bos_token_id is None:
        raise ParamsError(
            "corpus.add_bos=true asks for a token that begins each document, and the teacher's "
            "tokenizer names no bos_token: set it to auto or false"
        )
    return [int(tokenizer.bos_token_id)]


@dataclass(frozen=True)
class Tokenized:
    """A document cut to the number of tokens that are kept, plus one token if it has more."""

    document: Document
    num_characters: int  # in the whole text
    position: int  # the place in the source where it ends
    digest: bytes  # of the whole text or conversation


class DocumentTokenizer:
    """A converter from texts and conversations to documents.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        completions_only: put only the assistant's turns into the loss; texts are refused.
        add_bos: whether texts begin with the BOS token; `auto` does as the tokenizer does.
        longest: number of tokens after which the rest of a document is not tokenized; None keeps
            all.
        bad: collects the conversations that cannot be used.

    Attributes:
        leading: ids put before each text.
        num_texts: number of texts so far.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        completions_only: bool,
        add_bos: Literal["auto"] | bool,
        longest: int | None,
        bad: _BadDocuments,
    ) -> None:
        self.tokenizer = tokenizer
        self.separator = document_separator(tokenizer)
        self.leading = leading_tokens(tokenizer, add_bos)
        self._completions_only = completions_only
        self._limit = None if longest is None else longest + 1
        self._encode = PrefixEncoder(tokenizer, self._limit)
        self._bad = bad
        self.num_texts = 0

    def __call__(self, sources: Iterator[Source]) -> Iterator[Tokenized]:
        """Tokenize in order, several texts at once.

        The separator is put after each text. A conversation is rendered by its template, which
        itself writes the beginning and the end of each turn.
        """
        for block in _blocks(sources):
            for are_texts, group in groupby(block, key=lambda it: isinstance(it.content, str)):
                yield from (self._texts if are_texts else self._chats)(list(group))

    @cached_property
    def _chat(self) -> ChatTokenizer:
        return ChatTokenizer(
            self.tokenizer, completions_only=self._completions_only, limit=self._limit
        )

    def _chats(self, sources: list[Source]) -> Iterator[Tokenized]:
        to_document = self._chat
        for source in sources:
            try:
                document = to_document(source.content)  # type: ignore[arg-type]
            except BadConversationError as error:
                self._bad.add(source.place, str(error))
            else:
                yield Tokenized(
                    document, _characters(source.content), source.position, source.digest
                )

    def _texts(self, sources: list[Source]) -> Iterator[Tokenized]:
        texts = [source.content for source in sources if isinstance(source.content, str)]
        if self._completions_only:
            raise ParamsError(
                f"corpus.loss_on=completions needs conversations, and the corpus holds text "
                f"({texts[0][:40]!r}...): set it to all, or name a column of messages"
            )
        self.num_texts += len(texts)
        encoded = self._encode.texts(texts)
        for source, text, (ids, is_whole) in zip(sources, texts, encoded, strict=True):
            end = [self.separator] if is_whole else []  # a text that is cut has no end
            tokens = np.array([*self.leading, *ids, *end], dtype=np.int64)
            document = Document(tokens, np.ones(len(tokens), dtype=np.bool_))
            yield Tokenized(document, len(text), source.position, source.digest)

    def text_of(self, document: Document) -> str:
        """Decode a document without the tokens added before and after it."""
        tokens = document.tokens.tolist()
        if tokens[: len(self.leading)] == self.leading:
            tokens = tokens[len(self.leading) :]
        if tokens and tokens[-1] == self.separator:
            tokens = tokens[:-1]
        return str(self.tokenizer.decode(tokens))


def _blocks(sources: Iterator[Source]) -> Iterator[list[Source]]:
    block: list[Source] = []
    characters = 0
    for source in sources:
        block.append(source)
        characters += _characters(source.content)
        if len(block) == _DOCUMENTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _characters(content: Any) -> int:
    """Count the characters of a text, or of all texts in a conversation."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, dict):
        return sum(map(_characters, content.values()))
    return sum(map(_characters, content)) if isinstance(content, list) else 0


class _BadDocuments:
    """The documents that cannot be used, each with its place and the reason.

    Raises:
        DecantError: raised by `add` if there are more than `limit`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.found: dict[str, str] = {}

    def add(self, place: str, reason: str) -> None:
        self.found.setdefault(place, reason)  # each split reads the whole source
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
class _Counter:
    """Counts of what happened to the documents of one split."""

    extent: Extent = field(default_factory=Extent)
    read: int = 0
    duplicates: int = 0
    dropped: int = 0
    cut: int = 0  # by max_document_tokens
    characters: int = 0
    kept_characters: int = 0
    text_bytes: int = 0
    full_at: int | None = None  # bytes of the source when the split was full


def _taken(
    to_documents: DocumentTokenizer,
    sources: Iterator[Source],
    params: CorpusParams,
    split: str,
    counter: _Counter,
    writer: SplitWriter,
) -> Iterator[Document]:
    """Yield documents cut to their limit, up to the split's limit; skip those without a target."""
    taken = writer.num_tokens
    limit: int | None = getattr(params, f"{split}_tokens")
    if limit is not None and taken >= limit:
        counter.full_at = 0
        return
    total = limit and limit - taken
    with progress_bar(what=f"corpus {split}", total=total, unit="tok") as bar:
        for tokenized in to_documents(sources):
            whole = tokenized.document
            longest = params.max_document_tokens or len(whole)
            document = whole[: longest if limit is None else min(longest, limit - taken)]
            counter.read += 1
            writer.saw(tokenized.digest)
            if not document.in_loss.any():
                counter.dropped += 1
                continue
            taken += len(document)
            text = to_documents.text_of(document)
            counter.text_bytes += len(text.encode())
            counter.characters += tokenized.num_characters
            counter.kept_characters += min(len(text), tokenized.num_characters)
            counter.cut += len(whole) > longest
            bar.update(len(document))
            yield document
            if limit is not None and taken >= limit:
                counter.full_at = tokenized.position
                return


def _chosen(
    params: CorpusParams,
    split: str,
    counter: _Counter,
    bad: _BadDocuments,
    known: Iterable[bytes],
) -> Iterator[Source]:
    """Yield the documents of one split without exact duplicates, and without those that it has.

    Args:
        known: the digests of the documents that the split has.
    """
    seen = set(known)
    for source in read_documents(params, counter.extent):
        if source.fault is not None:
            bad.add(source.place, source.fault)
            continue
        content = source.content
        try:
            digest = _digest(content if isinstance(content, str) else _canonical(content))
        except UnicodeEncodeError:
            bad.add(source.place, "it holds half of a surrogate pair, which is not a character")
            continue
        is_validation = int.from_bytes(digest[:8]) < params.validation_fraction * 2**64
        if is_validation != (split == "validation"):
            continue
        if digest in seen:
            counter.duplicates += 1
            continue
        seen.add(digest)
        yield replace(source, digest=digest)


def _digest(text: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(text), 2**20):  # makes no second copy of a long text
        digest.update(text[start : start + 2**20].encode())
    return digest.digest()


def _canonical(messages: list[Message]) -> str:
    """Serialise a conversation to the same text whatever the order of its keys."""
    return json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)
