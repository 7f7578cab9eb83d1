from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.packing import (
    IGNORE,
    PACKERS,
    PADDING,
    Document,
    Rows,
    best_fit,
    concat,
    next_token_labels,
)

DOCUMENTS = st.lists(st.lists(st.integers(1, 99), max_size=30), max_size=12)


def document(tokens: Sequence[int]) -> Document:
    """Odd tokens are in the loss."""
    values = np.array(tokens, dtype=np.int64)
    return Document(values, values % 2 == 1)


def packed(way: str, documents: list[list[int]], length: int, at_once: int) -> Rows:
    blocks = list(PACKERS[way](map(document, documents), length, 0, at_once))
    assert all(len(block) and block.tokens.shape[1] == length for block in blocks)
    if way == "concat":
        assert all(len(block) == at_once for block in blocks[:-1])
    return Rows.cat(blocks or [Rows(*np.zeros((3, 0, length), dtype=np.int64))])


@pytest.mark.parametrize("way", ["concat", "best_fit"])
@given(documents=DOCUMENTS, length=st.integers(2, 9), at_once=st.integers(1, 4))
def test_each_token_appears_once_and_in_order(
    way: str, documents: list[list[int]], length: int, at_once: int
) -> None:
    rows = packed(way, documents, length, at_once)
    real = [d for d in documents if d]
    for number, expected in enumerate(real):
        assert rows.tokens[rows.doc_ids == number].tolist() == expected
    padding = rows.doc_ids == PADDING
    assert (~padding).sum() == sum(map(len, real))
    assert np.array_equal(rows.in_loss, (rows.tokens % 2 == 1) & ~padding)
    assert (rows.tokens[padding] == 0).all()
    for row in padding:  # padding comes last in its row
        assert not (row[:-1] & ~row[1:]).any()


@given(documents=DOCUMENTS, length=st.integers(2, 9), at_once=st.integers(1, 4))
def test_cut_pads_the_last_row_alone(documents: list[list[int]], length: int, at_once: int) -> None:
    rows = packed("concat", documents, length, at_once)
    tokens, doc_ids = rows.tokens.flatten(), rows.doc_ids.flatten()
    count = sum(map(len, documents))
    assert tokens[:count].tolist() == [token for tokens in documents for token in tokens]
    assert (doc_ids[count:] == PADDING).all()
    assert len(tokens) - count < length


@given(documents=DOCUMENTS, length=st.integers(2, 9), at_once=st.integers(1, 4))
def test_fit_keeps_documents_whole(documents: list[list[int]], length: int, at_once: int) -> None:
    rows = packed("best_fit", documents, length, at_once)
    for number, tokens in enumerate(d for d in documents if d):
        where = np.argwhere(rows.doc_ids == number)
        assert len(set(where[:, 0].tolist())) == -(-len(tokens) // length)
        for one, two in pairwise(where.tolist()):  # adjacent, but where a long one goes on
            assert two == [one[0], one[1] + 1] or two[0] > one[0]
    for row in rows.doc_ids:
        real = row[row != PADDING].tolist()
        assert real == sorted(real)
    again = packed("best_fit", documents, length, at_once)
    assert np.array_equal(rows.tokens, again.tokens)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_no_two_rows_of_fit_would_fit_into_one(lengths: list[int]) -> None:
    rows = packed("best_fit", [[1] * n for n in lengths], 12, at_once=100)
    filled = sorted((rows.doc_ids != PADDING).sum(1).tolist())
    assert all(a + b > 12 for a, b in pairwise(filled))


def test_fit_by_hand() -> None:
    """Lengths 5, 3, 4, 2, 2 in rows of 8: 5 + 3 and 4 + 2 + 2, ordered by last document."""
    texts = [[n] * size for n, size in enumerate((5, 3, 4, 2, 2), start=1)]
    (rows,) = best_fit(map(document, texts), 8, 0, 100)
    assert rows.tokens.tolist() == [[1] * 5 + [2] * 3, [3] * 4 + [4] * 2 + [5] * 2]


def test_fit_wastes_little_of_mixed_lengths() -> None:
    """0.16 % of rows of 512, where one row per document would waste 36 %."""
    lengths = np.random.default_rng(0).lognormal(5.8, 0.9, 5000).astype(int)
    texts = [document(range(length)) for length in lengths.tolist()]
    rows = Rows.cat(list(best_fit(texts, 512, 0, 1024)))
    assert (rows.doc_ids == PADDING).mean() < 0.005
    assert 1 - lengths.clip(max=512).mean() / 512 > 0.3


def test_fit_of_many_short_documents_pads_the_last_row_alone() -> None:
    """Blocks hand what does not fill a row to the next, so nothing is lost at their ends."""
    texts = [[1]] * 1000
    for at_once in (1, 3, 50):
        rows = packed("best_fit", texts, 7, at_once)
        assert len(rows) == -(-1000 // 7)


def test_labels_are_the_next_tokens_of_the_same_document() -> None:
    tokens = torch.tensor([[11, 12, 13, 21, 22, 0, 0]])
    doc_ids = torch.tensor([[4, 4, 4, 5, 5, PADDING, PADDING]])
    labels = next_token_labels(tokens, doc_ids, torch.ones_like(doc_ids, dtype=torch.bool))
    # 13 ends document 4; 22 ends document 5; padding and the last position have no successor
    assert labels.tolist() == [[12, 13, IGNORE, 22, IGNORE, IGNORE, IGNORE]]


def test_a_shift_either_way_is_noticed() -> None:
    """A model that knows the successor has zero loss under these labels only."""
    tokens = torch.arange(10)[None]
    labels = next_token_labels(tokens, torch.zeros_like(tokens), torch.ones_like(tokens).bool())
    wanted = labels != IGNORE
    predicts_next = torch.nn.functional.one_hot((tokens + 1) % 10, 10).float() * 100
    predicts_itself = torch.nn.functional.one_hot(tokens, 10).float() * 100
    predicts_previous = torch.nn.functional.one_hot((tokens - 1) % 10, 10).float() * 100

    def loss(logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[wanted], labels[wanted]))

    assert loss(predicts_next) < 1e-6
    assert loss(predicts_itself) > 50
    assert loss(predicts_previous) > 50


@pytest.mark.parametrize("way", [concat, best_fit])
def test_empty_documents_take_no_number(way: object) -> None:
    (block,) = way(map(document, [[], [7, 8], [], [9]]), 4, 0, 1)  # type: ignore[operator]
    assert block.doc_ids.tolist() == [[0, 0, 1, PADDING]]
    assert block.doc_ids.dtype == np.int32


def test_labels_are_of_tokens_in_the_loss() -> None:
    """Of question 11 12 and answer 13 14, the answer: predicted at 12 and at 13."""
    tokens = torch.tensor([[11, 12, 13, 14, 21, 22, 23]])
    doc_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    in_loss = torch.tensor([[False, False, True, True, True, False, True]])
    labels = next_token_labels(tokens, doc_ids, in_loss)
    # 21 is in the loss, but nothing of its document comes before it
    assert labels.tolist() == [[IGNORE, 13, 14, IGNORE, IGNORE, 23, IGNORE]]
