"""The endless, seekable stream of training batches.

Which rows batch number i holds follows from (seed, i) alone: a resumed run seeks in O(1), and a
cached, an online and a teacherless run see the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.packing import IGNORE, next_token_labels
from pipeline.data.rows import CorpusSplit
from pipeline.store.reader import epoch_order
from pipeline.teacher.base import Teacher
from pipeline.topk import TopK


@dataclass(frozen=True)
class Batch:
    """tokens and labels int64 [B, L] (IGNORE where out of the loss); the teacher's TopK or None."""

    tokens: Tensor
    labels: Tensor
    topk: TopK | None

    @property
    def num_labels(self) -> int:
        """Positions in the loss."""
        return int((self.labels != IGNORE).sum())


def load_batch(corpus: CorpusSplit, teacher: Teacher | None, rows: NDArray[np.int64]) -> Batch:
    """The batch of the given corpus rows."""
    blocks = [corpus.rows(int(row), int(row) + 1) for row in rows]
    tokens = torch.from_numpy(np.concatenate([block.tokens for block in blocks]))
    doc_ids = torch.from_numpy(np.concatenate([block.doc_ids for block in blocks]))
    topk = teacher.top_k(rows, tokens) if teacher is not None else None
    return Batch(tokens=tokens, labels=next_token_labels(tokens, doc_ids), topk=topk)


class BatchStream:
    """Batches of shuffled rows, prepared one ahead in a background thread.

    Rows flow through epochs without a gap: a batch may hold the end of one epoch and the start of
    the next, so every row is seen exactly once an epoch whatever the batch size.
    """

    def __init__(
        self,
        corpus: CorpusSplit,
        teacher: Teacher | None,
        *,
        batch_rows: int,
        chunk_rows: int,
        window_chunks: int,
        seed: int,
    ) -> None:
        self._corpus = corpus
        self._teacher = teacher
        self._batch_rows = batch_rows
        self._epoch = lru_cache(maxsize=2)(
            lambda epoch: epoch_order(
                len(corpus),
                chunk_rows=chunk_rows,
                window_chunks=window_chunks,
                seed=seed,
                epoch=epoch,
            )
        )

    def rows_of(self, number: int) -> NDArray[np.int64]:
        """The corpus rows of batch `number` (from 0)."""
        size = len(self._corpus)
        first = number * self._batch_rows
        places = np.arange(first, first + self._batch_rows)
        return np.array([self._epoch(place // size)[place % size] for place in places])

    def starting_at(self, number: int) -> Iterator[Batch]:
        """Batches number, number + 1, ... without end."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as thread:
            ahead = thread.submit(self._load, number)
            while True:
                number += 1
                batch, ahead = ahead.result(), thread.submit(self._load, number)
                yield batch

    def _load(self, number: int) -> Batch:
        return load_batch(self._corpus, self._teacher, self.rows_of(number))
