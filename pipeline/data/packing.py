"""Pack documents into rows of L tokens, keeping document boundaries and the tokens in the loss.

There are two ways. `concat` concatenates all documents and cuts at row ends: only the end of the
last row is padded, and a document that crosses a row's end continues in the next row without its
beginning. `best_fit` keeps every document of up to L tokens whole, by best-fit-decreasing bin
packing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3): the room left
in a row is padding, which costs the teacher's time and bytes in the cache. Use `concat` for long
plain text, and `best_fit` for conversations, where an answer means little without its question.

Shapes: n rows, B batch, L row length.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

PADDING = -1
"""The document id of padding tokens."""

IGNORE = -100
"""The label of positions that are not in the loss (PyTorch's `ignore_index`)."""


@dataclass(frozen=True)
class Document:
    """A tokenized document: tokens int64 [m]; in_loss bool [m] says which of them are targets."""

    tokens: NDArray[np.int64]
    in_loss: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, place: slice) -> Document:
        return Document(self.tokens[place], self.in_loss[place])


@dataclass(frozen=True)
class Rows:
    """Packed rows; padding is not in the loss."""

    tokens: NDArray[np.int64]  # [n, L]
    doc_ids: NDArray[np.int32]  # [n, L], PADDING where there is no document
    in_loss: NDArray[np.bool_]  # [n, L], whether the TOKEN is the target of the position before it

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, place: slice) -> Rows:
        return Rows(self.tokens[place], self.doc_ids[place], self.in_loss[place])

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """Join parts along their rows."""
        return Rows(
            tokens=np.concatenate([part.tokens for part in parts]),
            doc_ids=np.concatenate([part.doc_ids for part in parts]),
            in_loss=np.concatenate([part.in_loss for part in parts]),
        )


@dataclass(frozen=True)
class _Piece:
    """A contiguous part of document `number` within a row."""

    number: int
    part: Document

    def __len__(self) -> int:
        return len(self.part)


def concat(
    documents: Iterable[Document], row_length: int, pad_id: int, rows_at_once: int
) -> Iterator[Rows]:
    """Concatenate documents and cut them into rows, `rows_at_once` at a time.

    Only the last row can have padding (token `pad_id`, document PADDING). Documents are numbered
    from 0 in order; empty ones get no number.
    """
    size = row_length * rows_at_once
    waiting: list[_Piece] = []
    waits = 0
    for piece in _pieces(documents, size):
        waiting.append(piece)
        waits += len(piece)
        if waits >= size:
            last = waiting.pop()
            room = len(last) - (waits - size)
            waiting.append(_Piece(last.number, last.part[:room]))
            yield _rows(_in_a_line(waiting, row_length), row_length, pad_id)
            waiting, waits = [_Piece(last.number, last.part[room:])], waits - size
    if waits:
        yield _rows(_in_a_line(waiting, row_length), row_length, pad_id)


def best_fit(
    documents: Iterable[Document], row_length: int, pad_id: int, rows_at_once: int
) -> Iterator[Rows]:
    """Pack whole documents into rows by best fit, from a buffer that fills `rows_at_once` rows.

    A document longer than a row is cut into pieces of a row's length and a remainder. The longest
    piece in the buffer is placed first, in the row with the least room that can hold it. Rows are
    yielded in ascending order of the last document in each, so the remainder of a long document
    comes after its other pieces. Within a row documents are in order, numbered as in `concat`.
    """
    waiting: list[_Piece] = []
    waits = 0
    for piece in _pieces(documents, row_length):
        waiting.append(piece)
        waits += len(piece)
        if waits >= row_length * rows_at_once:
            filled = _best_fit_decreasing(waiting, row_length)
            emptiest = min(filled, key=_length)  # waits, as only it may be less than half full
            waiting = emptiest if _length(emptiest) < row_length else []
            waits = _length(waiting)
            yield _rows([row for row in filled if row is not waiting], row_length, pad_id)
    if waiting:
        yield _rows(_best_fit_decreasing(waiting, row_length), row_length, pad_id)


PACKERS: dict[str, Callable[[Iterable[Document], int, int, int], Iterator[Rows]]] = {
    "concat": concat,
    "best_fit": best_fit,
}


def _pieces(documents: Iterable[Document], longest: int) -> Iterator[_Piece]:
    """Cut documents into pieces of at most `longest` tokens; number them, skip empty ones."""
    full = (document for document in documents if len(document))
    for number, document in enumerate(full):
        for start in range(0, len(document), longest):
            yield _Piece(number, document[start : start + longest])


def _best_fit_decreasing(pieces: list[_Piece], row_length: int) -> list[list[_Piece]]:
    """Pack pieces into rows; sort each row's pieces by number, and rows by their last piece."""
    rows: list[list[_Piece]] = []
    rooms: list[tuple[int, int]] = []  # (room left, index) of each row that is not full, ascending
    for piece in sorted(pieces, key=len, reverse=True):  # stable: equal lengths keep their order
        place = bisect_left(rooms, (len(piece), -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
            rows[row].append(piece)
        else:
            room, row = row_length, len(rows)
            rows.append([piece])
        if room > len(piece):
            insort(rooms, (room - len(piece), row))
    ordered = [sorted(row, key=lambda piece: piece.number) for row in rows]
    return sorted(ordered, key=lambda row: row[-1].number)


def _length(row: list[_Piece]) -> int:
    return sum(map(len, row))


def _in_a_line(pieces: list[_Piece], row_length: int) -> list[list[_Piece]]:
    """Lay pieces one after another, and cut them at row ends."""
    rows: list[list[_Piece]] = []
    room = 0
    for piece in pieces:
        start = 0
        while start < len(piece):
            if not room:
                rows.append([])
                room = row_length
            part = piece.part[start : start + room]
            rows[-1].append(_Piece(piece.number, part))
            start, room = start + len(part), room - len(part)
    return rows


def _rows(filled: list[list[_Piece]], row_length: int, pad_id: int) -> Rows:
    shape = (len(filled), row_length)
    rows = Rows(
        tokens=np.full(shape, pad_id, dtype=np.int64),
        doc_ids=np.full(shape, PADDING, dtype=np.int32),
        in_loss=np.zeros(shape, dtype=np.bool_),
    )
    for row, pieces in enumerate(filled):
        start = 0
        for piece in pieces:
            place = (row, slice(start, start + len(piece)))
            rows.tokens[place] = piece.part.tokens
            rows.doc_ids[place] = piece.number
            rows.in_loss[place] = piece.part.in_loss
            start += len(piece)
    return rows


def document_places(doc_ids: NDArray[Any]) -> Iterator[tuple[int, slice]]:
    """Yield the number and the place of each document in a row, given the row's doc_ids [L]."""
    bounds = np.flatnonzero(np.diff(doc_ids, prepend=PADDING, append=PADDING)).tolist()
    for start, stop in pairwise(bounds):
        if doc_ids[start] != PADDING:
            yield int(doc_ids[start]), slice(start, stop)


def next_token_labels(tokens: Tensor, doc_ids: Tensor, in_loss: Tensor) -> Tensor:
    """Return labels[t] = tokens[t + 1], or IGNORE if that is not a target in the same document.

    These positions are not in the loss: the last position of a row (its successor is in another
    row), the last token of a document (its successor belongs to another), padding, and positions
    before a token that is not in the loss, such as a user's words. Shifting the other way would
    train the student to copy its input.

    Args:
        tokens: int64 [B, L].
        doc_ids: integer [B, L], PADDING for padding.
        in_loss: bool [B, L].

    Returns:
        int64 [B, L].
    """
    import torch  # takes seconds, and the processes that tokenize do without

    labels = torch.full_like(tokens, IGNORE)
    follows = (doc_ids[:, 1:] == doc_ids[:, :-1]) & (doc_ids[:, 1:] != PADDING)
    labels[:, :-1] = torch.where(follows & in_loss[:, 1:], tokens[:, 1:], IGNORE)
    return labels


def row_labels(rows: Rows) -> Tensor:
    """Return the labels of packed rows, int64 [n, L]; see `next_token_labels`."""
    import torch

    return next_token_labels(*map(torch.from_numpy, (rows.tokens, rows.doc_ids, rows.in_loss)))


def unshifted_labels(rows: Rows) -> Tensor:
    """Return labels as transformers' models take them, int64 [n, L]: token t, or IGNORE, at t.

    The models shift them themselves, so token t is the target of position t - 1.
    """
    from torch.nn import functional as F

    return F.pad(row_labels(rows)[:, :-1], (1, 0), value=IGNORE)


def positions_in_loss(rows: Rows) -> Tensor:
    """Return where packed rows have a label, bool [n, L]: where the NEXT token is in the loss."""
    return row_labels(rows) != IGNORE
