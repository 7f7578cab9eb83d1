from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.packing import IGNORE, PADDING, next_token_labels, pack


@given(
    documents=st.lists(st.lists(st.integers(1, 99), max_size=30), max_size=12),
    length=st.integers(2, 9),
    at_once=st.integers(1, 4),
)
def test_nothing_is_lost_and_boundaries_are_kept(
    documents: list[list[int]], length: int, at_once: int
) -> None:
    blocks = list(pack(documents, length, pad_id=0, rows_at_once=at_once))
    tokens = [token for block in blocks for token in block.tokens.flatten().tolist()]
    doc_ids = [number for block in blocks for number in block.doc_ids.flatten().tolist()]
    real = [d for d in documents if d]
    assert [t for t, d in zip(tokens, doc_ids, strict=True) if d != PADDING] == [
        t for d in real for t in d
    ]
    for number, document in enumerate(real):
        assert [t for t, d in zip(tokens, doc_ids, strict=True) if d == number] == document
    padding = doc_ids.count(PADDING)
    assert padding < length
    assert doc_ids[len(doc_ids) - padding :] == [PADDING] * padding
    assert all(block.tokens.shape[1] == length for block in blocks)


def test_labels_are_the_next_tokens_of_the_same_document() -> None:
    tokens = torch.tensor([[11, 12, 13, 21, 22, 0, 0]])
    doc_ids = torch.tensor([[4, 4, 4, 5, 5, PADDING, PADDING]])
    labels = next_token_labels(tokens, doc_ids)
    # 13 ends document 4; 22 ends document 5; padding and the last position have no successor
    assert labels.tolist() == [[12, 13, IGNORE, 22, IGNORE, IGNORE, IGNORE]]


def test_a_shift_either_way_is_noticed() -> None:
    """A model that knows the successor has zero loss under these labels only."""
    tokens = torch.arange(10)[None]
    labels = next_token_labels(tokens, torch.zeros_like(tokens))
    wanted = labels != IGNORE
    predicts_next = torch.nn.functional.one_hot((tokens + 1) % 10, 10).float() * 100
    predicts_itself = torch.nn.functional.one_hot(tokens, 10).float() * 100
    predicts_previous = torch.nn.functional.one_hot((tokens - 1) % 10, 10).float() * 100

    def loss(logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[wanted], labels[wanted]))

    assert loss(predicts_next) < 1e-6
    assert loss(predicts_itself) > 50
    assert loss(predicts_previous) > 50


def test_empty_documents_take_no_number() -> None:
    (block,) = pack([[], [7, 8], [], [9]], 4, pad_id=0, rows_at_once=1)
    assert block.doc_ids.tolist() == [[0, 0, 1, PADDING]]
    assert block.doc_ids.dtype == np.int32
