"""Choose the documents of an imported capture, and write them as the rows of a corpus.

Every document is kept whole, in rows packed by best fit, since the teacher saw the whole of it: in
a row of its own, the second half would have targets whose context the student cannot see. Documents
go to training or validation by a hash of their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.config.params import Params
from pipeline.config.source_params import CorpusParams
from pipeline.data.corpus import num_ids
from pipeline.data.corpus_writer import SplitWriter
from pipeline.data.corpus_zarr import SPLITS, digest_of_tokens
from pipeline.data.mixture import split_of
from pipeline.data.packing import Document, Rows, best_fit, document_places
from pipeline.data.text_hashes import write_made_from
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.interchange.distillkit import DistillKitCapture
from pipeline.model.folder import hash_tokenizer
from pipeline.model.tokenizer import load_tokenizer
from pipeline.runtime.console import progress_bar, say


class Choice:
    """The documents that a split takes from the source, cut to its limits, in order.

    Args:
        vocab_size: number of ids of the tokenizer at `teacher`.
    """

    def __init__(self, params: CorpusParams, split: str, vocab_size: int, teacher: Path) -> None:
        self._params, self._split = params, split
        self._vocab_size, self._teacher = vocab_size, teacher
        self.limit = params.train_tokens if split == "train" else params.validation_tokens
        self.num_tokens = 0
        self.num_taken = 0
        self.num_cut = 0  # at corpus.max_document_tokens
        self.num_dropped = 0  # without a target
        self.digests: list[bytes] = []  # of the documents taken and dropped

    @property
    def is_full(self) -> bool:
        """Whether the split may not have two tokens more, the fewest with a target."""
        return self.limit is not None and self.limit - self.num_tokens < 2

    def take(self, place: str, document: Document) -> Document | None:
        """Return the part of a document that the split takes; None if it takes nothing.

        Raises:
            MismatchError: the document has ids that the tokenizer does not have.
            ParamsError: the part is longer than a row.
        """
        digest = digest_of_tokens(document.tokens)
        if self.is_full or split_of(digest, self._params.validation_fraction) != self._split:
            return None
        if (largest := int(document.tokens.max())) >= self._vocab_size:
            raise MismatchError(
                f"{place} holds token {largest}, and the tokenizer of {self._teacher} has "
                f"{self._vocab_size} ids: set paths.teacher to the folder of the tokenizer that "
                "the capture was made with"
            )
        self.digests.append(digest)
        whole = self._params.max_document_tokens or len(document)
        room = len(document) if self.limit is None else self.limit - self.num_tokens
        found = document[: min(whole, room)]
        if not found.in_loss[1:].any():
            self.num_dropped += 1
            return None
        row_length = self._params.row_length
        if len(found) > row_length:
            raise ParamsError(
                f"{place} holds a document of {len(document):,} tokens, more than "
                f"corpus.row_length={row_length}: raise that, or cut documents by "
                f"corpus.max_document_tokens={row_length}"
            )
        self.num_cut += whole < len(document)
        self.num_tokens += len(found)
        self.num_taken += 1
        return found

    def lines(self) -> Iterator[str]:
        """Yield a line about each part of the source that the split leaves out."""
        if self.is_full:
            yield (
                f"{self._split} is full at corpus.{self._split}_tokens={self.limit:,}; documents "
                "that follow are left out of it"
            )
        if self.num_cut:
            yield (
                f"{self.num_cut:,} of {self.num_taken:,} documents of {self._split} are cut at "
                f"corpus.max_document_tokens={self._params.max_document_tokens:,}"
            )
        if self.num_dropped:
            yield (
                f"{self.num_dropped:,} documents without a token in the loss are left out of "
                f"{self._split}"
            )


def write_corpus(
    params: Params, capture: DistillKitCapture, teacher: Path, made_from: dict[str, Any]
) -> None:
    """Write the rows of both splits, and then make them exist."""
    tokenizer = load_tokenizer(teacher)
    vocab_size, row_length = num_ids(tokenizer, teacher), params.corpus.row_length
    address, padding = params.paths.corpus, tokenizer.eos_token_id or 0
    writers, choices, num_bytes = {}, {}, dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        choice = Choice(params.corpus, split, vocab_size, teacher)
        writer = SplitWriter(address, split, row_length=row_length, vocab_size=vocab_size)
        with progress_bar(what=f"convert {split}", total=choice.limit, unit="tok") as bar:
            documents = _taken(capture, choice, bar)
            for rows in best_fit(documents, row_length, padding, params.prepare.shard_rows):
                writer.add(rows)
                for tokens in _documents_in(rows):
                    num_bytes[split] += len(str(tokenizer.decode(tokens)).encode())
        for digest in choice.digests:
            writer.saw(digest)
        if not writer.num_tokens:
            raise DecantError(
                f"the {split} split of the capture came out empty: give more of it, or change "
                f"corpus.validation_fraction={params.corpus.validation_fraction:g}"
            )
        writers[split], choices[split] = writer, choice
    write_made_from(address, made_from)  # both splits of another corpus are gone by now
    for split, writer in writers.items():
        writer.commit(
            num_text_bytes=num_bytes[split],
            num_dropped=choices[split].num_dropped,
            tokenizer_sha256=hash_tokenizer(teacher),
        )
        for line in choices[split].lines():
            say(f"convert: {line}")


def _taken(capture: DistillKitCapture, choice: Choice, bar: tqdm[Any]) -> Iterator[Document]:
    for place, document in capture.documents():
        if choice.is_full:
            return
        if (found := choice.take(place, document)) is not None:
            bar.update(len(found))
            yield found


def _documents_in(rows: Rows) -> Iterator[NDArray[np.int64]]:
    """Yield the tokens of each document in rows of whole documents."""
    for tokens, doc_ids in zip(rows.tokens, rows.doc_ids, strict=True):
        for _, place in document_places(doc_ids):
            yield tokens[place]
