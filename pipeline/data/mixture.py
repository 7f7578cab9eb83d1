"""Read one or several sources once, tokenize their documents, and deal them out to the splits.

A hash of a document's text decides whether it is for training or validation, so the same document
is on the same side in every run, order and machine. The documents of the other split wait until it
asks for them.

Of several sources, the next document of a split comes from the one with the fewest tokens in
proportion to its weight. So the shares of the tokens follow the weights at every point of the
split, to within one document, without random numbers. A split ends when the source whose turn it is
has no more documents.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pipeline.config.source_params import CorpusParams, TextSource, WeightedSource
from pipeline.data.corpus_zarr import SPLITS
from pipeline.data.document_tokenizer import Content, Result, Tokenized, characters
from pipeline.data.seen_documents import SeenDocuments
from pipeline.data.sources import Extent, Source, read_documents
from pipeline.data.tokenizer_pool import Pending, TokenizerPool
from pipeline.errors import DecantError

_DOCUMENTS_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 2**18  # a quarter of a second's work


@dataclass(frozen=True)
class Read:
    """A document that was read, and tokenized unless no split needs it."""

    place: str  # for the user
    position: int  # bytes of the source up to its end
    is_text: bool  # not a conversation
    digest: bytes
    split: str
    result: Result | None


@dataclass(frozen=True)
class Fault:
    """A row that cannot be read as a document, with the reason."""

    place: str
    reason: str


@dataclass(frozen=True)
class _Unread:
    """A document that is to be tokenized."""

    read: Read
    content: Content
    is_needed: bool


class Mixture:
    """The documents of all sources, in the order of each split.

    Args:
        seen: the documents that were taken already, which are not tokenized again.
        on_fault: is called for rows that cannot be read, in order.

    Attributes:
        sources: the sources, of which there may be only one.
        extents: how much of each source was read.
        tokens: the tokens of each source that each split has taken.
        ended_by: the source that had no more documents when a split needed one, by its index.
    """

    def __init__(
        self,
        params: CorpusParams,
        pool: TokenizerPool,
        seen: SeenDocuments,
        on_fault: Callable[[Fault], None],
    ) -> None:
        self.sources = params.text_sources
        self.extents = [Extent() for _ in self.sources]
        self.tokens = {split: [0] * len(self.sources) for split in SPLITS}
        self.ended_by: dict[str, int] = {}
        self._weights = [weight_of(source) for source in self.sources]
        self._fraction = params.validation_fraction
        self._pool = pool
        self._seen = seen
        self._on_fault = on_fault
        self._streams = [
            self._stream(*both) for both in zip(self.sources, self.extents, strict=True)
        ]
        self._waiting = {split: [deque[Read]() for _ in self.sources] for split in SPLITS}
        self._num_waiting = dict.fromkeys(SPLITS, 0)

    def documents(self, split: str) -> Iterator[tuple[int, Read]]:
        """Yield the documents of a split, each with the index of its source.

        `tokens` must be up to date when the next one is asked for.
        """
        tokens = self.tokens[split]
        while True:
            source = min(range(len(tokens)), key=lambda n: tokens[n] / self._weights[n])
            read = self._next(source, split)
            if read is None:
                self.ended_by[split] = source
                return
            yield source, read

    def num_waiting(self, split: str) -> int:
        """Return how many tokens were read for a split and wait for it."""
        return self._num_waiting[split]

    def close(self, split: str) -> None:
        """Read nothing more for a split."""
        del self._waiting[split]

    def _next(self, source: int, split: str) -> Read | None:
        waiting = self._waiting[split][source]
        while not waiting:
            read = next(self._streams[source], None)
            if read is None:
                return None
            if isinstance(read, Fault):
                self._on_fault(read)
            elif read.split in self._waiting:
                self._waiting[read.split][source].append(read)
                self._num_waiting[read.split] += _num_tokens(read)
        read = waiting.popleft()
        self._num_waiting[split] -= _num_tokens(read)
        return read

    def _stream(self, source: TextSource, extent: Extent) -> Iterator[Read | Fault]:
        """Yield the rows of a source in order, while the next blocks are being tokenized."""
        blocks = _blocks(map(self._judged, read_documents(source, extent)))
        submitted: deque[tuple[list[_Unread | Fault], Pending]] = deque()
        failure: DecantError | None = None
        is_at_end = False
        while True:
            while not is_at_end and len(submitted) < self._pool.depth:
                try:
                    block = next(blocks, None)
                except DecantError as error:  # waits for the documents before it
                    failure, block = error, None
                if block is None:
                    is_at_end = True
                    break
                submitted.append((block, self._pool.submit(list(_needed(block)))))
            if not submitted:
                break
            block, pending = submitted.popleft()
            results = iter(pending())
            for row in block:
                if isinstance(row, Fault):
                    yield row
                else:
                    yield replace(row.read, result=next(results)) if row.is_needed else row.read
        if failure:
            raise failure

    def _judged(self, source: Source) -> _Unread | Fault:
        if source.fault is not None:
            return Fault(source.place, source.fault)
        content = source.content
        is_text = isinstance(content, str)
        try:
            digest = _digest(content if isinstance(content, str) else _canonical(content))
        except UnicodeEncodeError:
            reason = "it holds half of a surrogate pair, which is not a character"
            return Fault(source.place, reason)
        split = split_of(digest, self._fraction)
        read = Read(source.place, source.position, is_text, digest, split, None)
        # Neither a split that is full nor a document that was taken can become undone meanwhile.
        is_needed = split in self._waiting and digest not in self._seen
        return _Unread(read, content, is_needed)


def split_of(digest: bytes, validation_fraction: float) -> str:
    """Return the split to which a document belongs, by the hash of its content."""
    is_validation = int.from_bytes(digest[:8]) < validation_fraction * 2**64
    return "validation" if is_validation else "train"


def _needed(block: list[_Unread | Fault]) -> Iterator[Content]:
    return (row.content for row in block if isinstance(row, _Unread) and row.is_needed)


def _num_tokens(read: Read) -> int:
    return len(read.result.tokens) if isinstance(read.result, Tokenized) else 0


def weight_of(source: TextSource) -> float:
    """Return a source's weight; that of the only source does not matter."""
    return source.weight if isinstance(source, WeightedSource) else 1.0


def source_name(source: TextSource) -> str:
    """Name a source for the user."""
    if source.source == "files":
        return f"files {' '.join(source.files.paths)}"
    if source.source == "hub":
        return " ".join(filter(None, ("hub", source.hub.id, source.hub.name)))
    return source.source


def _blocks(rows: Iterator[_Unread | Fault]) -> Iterator[list[_Unread | Fault]]:
    """Group rows; those before an error come first."""
    block: list[_Unread | Fault] = []
    size = 0
    try:
        for row in rows:
            block.append(row)
            size += characters(row.content) if isinstance(row, _Unread) and row.is_needed else 0
            if len(block) == _DOCUMENTS_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
                yield block
                block, size = [], 0
    except DecantError:
        if block:
            yield block
        raise
    if block:
        yield block


def _digest(text: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(text), 2**20):  # makes no second copy of a long text
        digest.update(text[start : start + 2**20].encode())
    return digest.digest()


def _canonical(messages: object) -> str:
    """Serialise a conversation to the same text whatever the order of its keys."""
    return json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)
