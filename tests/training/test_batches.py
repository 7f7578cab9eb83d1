"""The stream of batches: order, shares of ranks, what is read, labels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE, PADDING
from pipeline.data.row_order import read_rows
from pipeline.logit_cache.reader import Shard
from pipeline.target_sources.cached import CachedTargets
from pipeline.target_sources.tokens_only import TokensOnly
from pipeline.training.batches import BatchStream, first_rows, make_batch
from tests.helpers import open_cache


def test_documents_ends_and_padding_are_out_of_the_loss(tiny_cache: Params) -> None:
    corpus = CorpusSplit(tiny_cache.paths.corpus, "train")
    last = len(corpus) - 1
    whole = read_rows(corpus, 0, len(corpus))
    batch = make_batch(
        TokensOnly(corpus, shard_rows=len(corpus), document_mask=True),
        [(whole, 0), (whole, 1), (whole, last)],
    )
    rows = [corpus.rows(row, row + 1) for row in (0, 1, last)]
    doc_ids = np.concatenate([row.doc_ids for row in rows])
    tokens = np.concatenate([row.tokens for row in rows])
    assert (doc_ids[-1] == PADDING).any()
    for r in range(3):
        for t in range(32):
            label = int(batch.labels[r, t])
            if t == 31 or doc_ids[r, t + 1] != doc_ids[r, t] or doc_ids[r, t] == PADDING:
                assert label == IGNORE
            else:
                assert label == tokens[r, t + 1]


def test_batches_name_documents_only_where_rows_hold_several(tiny_corpus: Params) -> None:
    corpus = CorpusSplit(tiny_corpus.paths.corpus, "train")
    whole = read_rows(corpus, 0, len(corpus))
    several = [len(np.unique(row[row != PADDING])) > 1 for row in whole.rows.doc_ids]
    assert {True, False} == set(several)
    for document_mask in (True, False):
        teacher = TokensOnly(corpus, shard_rows=len(corpus), document_mask=document_mask)  # type: ignore[arg-type]
        for row, mixed in enumerate(several):
            batch = make_batch(teacher, [(whole, row)])
            assert (batch.doc_ids is not None) == (mixed and document_mask)
        batch = make_batch(teacher, [(whole, row) for row in range(len(corpus))])
        if document_mask:
            assert np.array_equal(batch.doc_ids, whole.rows.doc_ids)  # type: ignore[arg-type]


def test_stream_sees_every_row_and_seeks(tiny_corpus: Params) -> None:
    corpus = CorpusSplit(tiny_corpus.paths.corpus, "train")
    teacher = TokensOnly(corpus, shard_rows=16, document_mask=False)
    stream = BatchStream(teacher, batch_rows=5, window_shards=3, seed=7)
    counted = stream.starting_at(0)
    batches = [next(counted).tokens for _ in range(2 * len(corpus))]
    seen = [tuple(row.tolist()) for batch in batches for row in batch]
    whole = sorted(tuple(row.tolist()) for row in corpus.rows(0, len(corpus)).tokens)
    # Batches of 5 end with an epoch after every 5 epochs (each epoch alone: test_reader.py).
    for first in (0, 5 * len(corpus)):
        assert sorted(seen[first : first + 5 * len(corpus)]) == sorted(5 * whole)
    for number in (1, 9, 19, 57):
        assert torch.equal(next(stream.starting_at(number)).tokens, batches[number])


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_the_same_batches(ranks: int, tiny_cache: Params) -> None:
    teacher = CachedTargets(open_cache(tiny_cache))
    options = {"batch_rows": 9, "window_shards": 2, "seed": 3}
    alone = BatchStream(teacher, **options).starting_at(4)
    together = [
        BatchStream(teacher, rank=rank, world_size=ranks, **options).starting_at(4)
        for rank in range(ranks)
    ]
    for _ in range(15):
        one, parts = next(alone), [next(stream) for stream in together]
        assert torch.equal(one.tokens, torch.cat([part.tokens for part in parts]))
        assert one.topk is not None
        ids = [part.topk.ids for part in parts if part.topk is not None]
        assert torch.equal(one.topk.ids, torch.cat(ids))


def test_shards_are_read_once_an_epoch_and_dropped(tiny_cache: Params) -> None:
    read: list[int] = []

    class Counting(CachedTargets):
        def shard(self, number: int) -> Shard:
            read.append(number)
            return super().shard(number)

    teacher = Counting(open_cache(tiny_cache))
    stream = BatchStream(teacher, batch_rows=4, window_shards=2, seed=0)
    rows = len(teacher.corpus)
    batches = stream.starting_at(0)
    for _ in range(3 * rows // 4 - 16):  # up to where the look-ahead ends the third epoch
        next(batches)
    batches.close()
    counts = Counter(read)
    assert set(counts) == set(range(6))
    assert max(counts.values()) <= 4
    assert sum(counts.values()) <= 3 * 6 + 2


def test_first_rows_are_shared_and_no_rank_goes_without(tiny_cache: Params) -> None:
    """11 rows in batches of 5: the last one, a single row, leaves two of three ranks empty."""
    teacher = CachedTargets(open_cache(tiny_cache))
    alone = list(first_rows(teacher, 11, 5))
    ranks = [list(first_rows(teacher, 11, 5, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(batch.tokens) for batch in alone] == [5, 5, 1]
    assert [[len(batch.tokens) for batch in part] for part in ranks] == [[2, 2, 1]] * 2 + [[1] * 3]
    for number, whole in enumerate(alone):
        parts = [part[number] for part in ranks]
        assert sum(part.num_labels for part in parts) == whole.num_labels
        tokens = torch.cat([part.tokens for part in parts if part.num_labels])
        assert torch.equal(tokens, whole.tokens)
    assert [part[2].num_labels > 0 for part in ranks] == [True, False, False]
