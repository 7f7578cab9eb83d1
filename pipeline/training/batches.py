"""The endless, seekable stream of training batches.

The rows of batch i depend only on (seed, i). So a resumed run seeks in O(1), and runs with
cached, online and no targets see the same rows in the same order on any number of ranks. Worker
threads read and decode shards ahead of time. Another thread assembles the next batch while one is
in use (unless the targets must be computed in the consumer's thread), in pinned memory when
training on a GPU.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.packing import IGNORE, row_labels
from pipeline.data.row_order import Shard, ShuffledRows
from pipeline.model.attention_mask import documents_apart
from pipeline.target_sources.target_source import Place, TargetSource, rows_at
from pipeline.targets.selection import number_kept
from pipeline.targets.topk import TopK

_BATCHES_AHEAD = 16  # read the shards of this many batches in advance
_WORKERS = 2


@dataclass(frozen=True)
class Batch:
    """One batch: token ids, labels and, unless training has none, the teacher's targets.

    Attributes:
        tokens: int64 [B, L]: B rows of this rank, of L tokens each.
        labels: int64 [B, L], IGNORE where a position is not in the loss; on the CPU, like tokens.
        topk: the targets, TopK [B, L, ...], or None if training has none.
        doc_ids: int32 [B, L] on the CPU, which documents the model must keep apart; None if plain
            causal attention over the rows gives the same result or is wanted
            (pipeline/model/attention_mask.py).
        num_targets: number of positions in the loss that have a target.
    """

    tokens: Tensor
    labels: Tensor
    topk: TopK | None
    doc_ids: Tensor | None = None
    num_targets: int = 0

    @property
    def in_loss(self) -> Tensor:
        """The positions in the loss, int64 [n], in ascending order, counted over [B * L]."""
        return (self.labels != IGNORE).flatten().nonzero()[:, 0]

    @property
    def num_labels(self) -> int:
        """Number of positions in the loss."""
        return int((self.labels != IGNORE).sum())

    def pinned(self) -> Batch:
        """Return the batch in page-locked memory, so that copying it to the GPU does not block."""
        topk = self.topk  # an online teacher's TopK is already on the GPU
        if topk is not None and topk.lse.device.type == "cpu":
            topk = topk.map(Tensor.pin_memory)
        tokens, labels = self.tokens.pin_memory(), self.labels.pin_memory()
        return replace(self, tokens=tokens, labels=labels, topk=topk)


def make_batch(source: TargetSource, places: list[Place]) -> Batch:
    """Return the batch of the given corpus rows, whose shards are already read."""
    rows = rows_at(places)
    tokens, doc_ids = torch.from_numpy(rows.tokens), torch.from_numpy(rows.doc_ids)
    labels = row_labels(rows)
    quantile = source.entropy_quantile
    num_targets = 0  # counted without the targets, which may be on a GPU
    if quantile is not None:
        num_targets = int(number_kept((labels != IGNORE).sum(-1), quantile).sum())
    return Batch(
        tokens=tokens,
        labels=labels,
        topk=source.targets(places, tokens),
        doc_ids=documents_apart(doc_ids, source.document_mask),
        num_targets=num_targets,
    )


def first_rows(
    source: TargetSource, count: int, batch_rows: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Yield batches of the first `count` rows in corpus order, with this rank's share of each.

    All ranks get the same number of batches, because a sharded student runs on all ranks or on
    none. If the last batch is too short to give this rank a row, the rank gets a row whose labels
    are all IGNORE.
    """
    count = min(count, len(source.corpus))
    shard: Shard | None = None
    for first in range(0, count, batch_rows):
        whole = np.arange(first, min(first + batch_rows, count))
        share = np.array_split(whole, world_size)[rank]
        places: list[Place] = []
        for row in share if len(share) else whole[:1]:
            if shard is None or row >= shard.first + len(shard.rows):
                shard = source.shard(int(row) // source.shard_rows)
            places.append((shard, int(row)))
        batch = make_batch(source, places)
        if not len(share):
            batch = replace(batch, labels=torch.full_like(batch.labels, IGNORE), num_targets=0)
        yield batch


class BatchStream:
    """An endless stream of batches of shuffled rows.

    Rows flow through epochs without a gap: a batch may hold the end of one epoch and the start of
    the next, so every row is seen exactly once per epoch whatever the batch size. With several
    ranks, `batch_rows` counts the rows of all ranks together. The rows of a batch are ordered by
    shard before each rank takes its share, so that a rank reads as few shards as possible.

    Args:
        window_shards: number of shards whose rows are mixed; two windows are in memory at a time.
        pin: put batches into page-locked memory.
    """

    def __init__(
        self,
        source: TargetSource,
        *,
        batch_rows: int,
        window_shards: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
    ) -> None:
        self.source = source
        self._batch_rows = batch_rows
        self._rank = rank
        self._world_size = world_size
        self._pin = pin
        self._order = ShuffledRows(
            len(source.corpus),
            shard_rows=source.shard_rows,
            window_shards=window_shards,
            seed=seed,
        )

    def rows_of(self, number: int) -> NDArray[np.int64]:
        """Return this rank's corpus rows of batch `number` (from 0)."""
        rows = np.sort(self._order.at(number * self._batch_rows, self._batch_rows))
        return np.array_split(rows, self._world_size)[self._rank]

    def starting_at(self, number: int) -> Iterator[Batch]:
        """Yield batches number, number + 1, ... without end."""
        with ExitStack() as stack:
            readers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="shards")
            # A new thread uses GPU 0; pinning there would open a context on another rank's GPU.
            on_gpu = (torch.cuda.set_device, (torch.cuda.current_device(),)) if self._pin else ()
            maker = ThreadPoolExecutor(1, "batches", *on_gpu)
            for pool in (readers, maker):  # leaving early must not wait for queued work
                stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            window = _ShardWindow(self.source, readers)
            coming: deque[NDArray[np.int64]] = deque()
            ready: Future[Batch] | None = None
            while True:
                while len(coming) < _BATCHES_AHEAD:
                    coming.append(self.rows_of(number))
                    window.want(coming[-1])
                    number += 1
                rows = coming.popleft()
                if not self.source.in_background:
                    yield self._make(window, rows)
                    continue
                making = maker.submit(self._make, window, rows)
                if ready is not None:
                    yield ready.result()
                ready = making

    def _make(self, window: _ShardWindow, rows: NDArray[np.int64]) -> Batch:
        batch = make_batch(self.source, window.places(rows))
        window.done(rows)
        return batch.pinned() if self._pin else batch


class _ShardWindow:
    """The shards that current and upcoming batches need, each read once, dropped after last use.

    The consumer's thread calls `want`; the thread that makes batches calls `places` and `done`, in
    the same order. If a shard is wanted again while it is in use, its use count goes up; it is not
    read again.
    """

    def __init__(self, source: TargetSource, readers: ThreadPoolExecutor) -> None:
        self._source = source
        self._readers = readers
        self._lock = threading.Lock()
        self._uses: Counter[int] = Counter()
        self._shards: dict[int, Future[Shard]] = {}

    def want(self, rows: NDArray[np.int64]) -> None:
        with self._lock:
            for number in self._numbers(rows):
                self._uses[number] += 1
                if number not in self._shards:
                    self._shards[number] = self._readers.submit(self._source.shard, number)

    def places(self, rows: NDArray[np.int64]) -> list[Place]:
        size = self._source.shard_rows
        return [(self._shards[int(row) // size].result(), int(row)) for row in rows]

    def done(self, rows: NDArray[np.int64]) -> None:
        with self._lock:
            for number in self._numbers(rows):
                self._uses[number] -= 1
                if not self._uses[number]:
                    del self._uses[number], self._shards[number]

    def _numbers(self, rows: NDArray[np.int64]) -> list[int]:
        return [int(n) for n in np.unique(rows // self._source.shard_rows)]
