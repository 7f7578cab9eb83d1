"""Documents to rows of L tokens by concatenate-then-chunk, with document boundaries kept.

Nothing is lost and nothing is padded but the end of the last row. A row may hold the end of one
document and the start of others; `doc_ids` says which token belongs to which, so that the loss at
document ends (and, where wanted, attention across documents) can be masked.

Shapes: n rows, B batch, L row length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PADDING = -1
"""The document id of padding tokens."""

IGNORE = -100
"""The label of positions that are out of the loss (PyTorch's `ignore_index`)."""


@dataclass(frozen=True)
class Rows:
    """Packed rows: tokens int64 [n, L] and doc_ids int32 [n, L], PADDING where there is none."""

    tokens: NDArray[np.int64]
    doc_ids: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """Parts joined along their rows."""
        return Rows(
            tokens=np.concatenate([part.tokens for part in parts]),
            doc_ids=np.concatenate([part.doc_ids for part in parts]),
        )


def pack(
    documents: Iterable[list[int]], row_length: int, pad_id: int, rows_at_once: int
) -> Iterator[Rows]:
    """Concatenate tokenized documents and cut into rows, `rows_at_once` at a time.

    Only the last row can carry padding (token `pad_id`, document PADDING). Documents are numbered
    from 0 in order; empty ones take no number.
    """
    tokens: list[int] = []
    doc_ids: list[int] = []
    size = row_length * rows_at_once
    number = 0
    for document in documents:
        if not document:
            continue
        tokens += document
        doc_ids += [number] * len(document)
        number += 1
        while len(tokens) >= size:
            yield _rows(tokens[:size], doc_ids[:size], row_length)
            del tokens[:size], doc_ids[:size]
    if tokens:
        missing = -len(tokens) % row_length
        yield _rows(tokens + [pad_id] * missing, doc_ids + [PADDING] * missing, row_length)


def _rows(tokens: list[int], doc_ids: list[int], row_length: int) -> Rows:
    return Rows(
        tokens=np.array(tokens, dtype=np.int64).reshape(-1, row_length),
        doc_ids=np.array(doc_ids, dtype=np.int32).reshape(-1, row_length),
    )


def next_token_labels(tokens: Tensor, doc_ids: Tensor) -> Tensor:
    """labels[t] = tokens[t + 1], IGNORE where that is not the same document's next token.

    Out of the loss: the last position of a row (its successor is in another row), the last token
    of a document (its successor belongs to another), and padding. Shifting the other way would
    train the student to copy its input.

    Args:
        tokens: int64 [B, L]. doc_ids: integer [B, L], PADDING for padding.

    Returns:
        int64 [B, L].
    """
    labels = torch.full_like(tokens, IGNORE)
    follows = (doc_ids[:, 1:] == doc_ids[:, :-1]) & (doc_ids[:, 1:] != PADDING)
    labels[:, :-1] = torch.where(follows, tokens[:, 1:], IGNORE)
    return labels
