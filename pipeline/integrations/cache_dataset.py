"""Corpus and cache as datasets of PyTorch, for any training loop.

    dataset = CacheDataset("cache/corpus.zarr", "cache/logits.zarr")
    loader = DataLoader(
        dataset, batch_size=8, sampler=ShardSampler(dataset, seed=0), collate_fn=collate
    )

A row is a dict of tensors, named as transformers names them, with the teacher's under `teacher_`:

    input_ids                  int64 [L]
    labels                     int64 [L], as transformers has them: the token itself, or IGNORE
                               where it is not in the loss; position t predicts labels[t + 1]
    doc_ids                    int32 [L], the number of the document; -1 for padding
    position_ids               int64 [L], counted from the start of each document; only in the rows
                               of a cache whose teacher kept documents apart
    teacher_has_target         bool [L], False where all other values of the teacher have no meaning
    teacher_ids                int32 [L, K], in descending order of probability
    teacher_logprobs           float32 [L, K], nats at temperature 1; -inf where no id is kept
    teacher_lse                float32 [L], logsumexp of all logits; not in imported caches
    teacher_entropy            float32 [L], nats, at temperature 1; not in imported caches
    teacher_lse_tau_2.0        float32 [L], log sum exp(logprob / 2); one key per stored temperature
    teacher_sampled_ids        int32 [L, D], only in caches with sampled ids, like the following
    teacher_sampled_counts     int32 [L, D], how often each was sampled; 0 where no id is
    teacher_sampled_logprobs   float32 [L, D], only if temperatures other than 1 are stored

What depends on the cache alone is in the keys and not in further tensors. So every tensor has the
row as its first axis, any tool may slice, join, pin or move them, and no number has to be read from
a GPU. `pipeline.integrations.kd_loss.sparse_kd_loss` takes such a batch.

Every shard is checked against its hash and its rows when it is read, as in training by
`stages/train.py`. Datasets may be given to worker processes by fork and by pickle, and each opens
the cache anew.

Shapes: B batch, L row length, K kept ids, D distinct sampled ids.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import unshifted_labels
from pipeline.data.row_order import ShuffledRows
from pipeline.errors import MismatchError, ParamsError
from pipeline.io.address import Address, in_repository, parse_address
from pipeline.logit_cache.format import Fingerprint
from pipeline.logit_cache.reader import CacheReader
from pipeline.model.attention_mask import document_positions
from pipeline.target_sources.target_source import rows_at
from pipeline.targets.topk import TopK

Row = dict[str, Tensor]
"""One row, or a batch with [B] before each shape."""

LSE_TAU = "teacher_lse_tau_"
_SAMPLED = "teacher_sampled_"
_ROWS_AT_ONCE = 8  # of an iterable dataset


class CacheDataset(Dataset[Row]):
    """The rows of one split with their targets, by number.

    Rows may be asked for in any order. As a shard is read whole, an order that jumps between shards
    reads them again and again: `ShardSampler` has one that does not.

    Args:
        corpus: address of the corpus: a folder, s3:// or gs://, or hf://datasets/ORG/NAME@REVISION.
        logits: address of the cache.
        split: "train" or "validation".
        k: use only the first k stored ids; None uses all.
        shards_in_memory: decoded shards that each process keeps, 264 bytes per token at K = 64; at
            least as many as a sampler mixes.

    Raises:
        MismatchError: the cache is missing, incomplete, damaged, or made from another corpus; a
            damaged shard raises it when it is read.
        DecantError: the corpus is missing or damaged.
    """

    def __init__(
        self,
        corpus: str | Path,
        logits: str | Path,
        split: str = "train",
        *,
        k: int | None = None,
        shards_in_memory: int = 8,
    ) -> None:
        self._corpus, self._logits = _address(corpus, "corpus"), _address(logits, "logits")
        self._split = split
        self._k = k
        self._shards_in_memory = shards_in_memory
        self._opened_by = 0
        self._made_from: Fingerprint | None = None
        self._open()

    def __len__(self) -> int:
        return self.fingerprint.num_rows

    def __getitem__(self, number: int) -> Row:
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return self.__getitems__([number % len(self)])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Row]:
        """Return several rows at once; a DataLoader calls this for each batch."""
        self._open()
        size = self.shard_rows
        places = [(self._shard(number // size), number) for number in map(int, numbers)]
        rows = rows_at(places)
        batch = {
            "input_ids": torch.from_numpy(rows.tokens),
            "labels": unshifted_labels(rows),
            "doc_ids": torch.from_numpy(rows.doc_ids),
            **_to_tensors(self._reader.gather(places)),
        }
        if self.fingerprint.document_mask:
            batch["position_ids"] = document_positions(batch["doc_ids"])
        return [{name: t[row] for name, t in batch.items()} for row in range(len(places))]

    @property
    def fingerprint(self) -> Fingerprint:
        """What the cache was made from."""
        return self._reader.fingerprint

    @property
    def shard_rows(self) -> int:
        """Number of rows per shard, the unit of reading."""
        return self._reader.layout.shard_rows

    def _open(self) -> None:
        """Open corpus and cache, unless this process has; connections do not survive a fork."""
        if self._opened_by == os.getpid():
            return
        self._reader = CacheReader(self._logits, CorpusSplit(self._corpus, self._split), k=self._k)
        if self._made_from not in (None, self._reader.fingerprint):
            raise MismatchError(
                f"{self._logits} has changed since it was opened: name a revision, or start again"
            )
        self._made_from = self._reader.fingerprint
        self._shard = lru_cache(maxsize=self._shards_in_memory)(self._reader.shard)
        self._opened_by = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened_by": 0, "_reader": None, "_shard": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class ShardSampler(Sampler[int]):
    """The order of `stages/train.py`: every row once per epoch, and few shards at a time.

    Shards are shuffled, then the rows of `shuffle_shards` shards at a time. Several ranks may share
    it as any sampler is shared, by torch's DistributedSampler or by accelerate.

    Args:
        seed: the order is a function of (seed, epoch).
        shuffle_shards: as `train.shuffle_shards`; not more than the dataset keeps in memory.
    """

    def __init__(self, dataset: CacheDataset, *, seed: int, shuffle_shards: int = 4) -> None:
        self._num_rows = len(dataset)
        self._order = _order(dataset, seed, shuffle_shards)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._order.at(self.epoch * self._num_rows, self._num_rows).tolist())


class IterableCacheDataset(IterableDataset[Row]):
    """The same rows as a stream, in which each shard is read by one process alone.

    The rows of an epoch, in the order of `ShardSampler`, are divided into as many consecutive parts
    of equal length as there are processes that read: ranks times DataLoader workers. If they do not
    divide evenly, the last rows of the epoch, fewer than there are parts, are left out; these are
    other rows in each epoch. So every rank has the same number of rows, and none waits for another.

    `state_dict` and `load_state_dict` are the interface of torchdata's StatefulDataLoader, with
    which a run continues after the last row that it was given.

    Args:
        dataset: the rows.
        seed, shuffle_shards: as in `ShardSampler`.
        rank, world_size: this process among those that train; None asks torch.distributed.

    Raises:
        ParamsError: on iteration, there are more parts than rows, or a state belongs to another
            number of parts.
    """

    def __init__(
        self,
        dataset: CacheDataset,
        *,
        seed: int,
        shuffle_shards: int = 4,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.dataset = dataset
        self._order = (seed, shuffle_shards)
        self._launched = (rank, world_size)
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # lasting workers see it too
        self._done = 0  # rows of this part
        self._continued: Mapping[str, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, from 0."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Row]:
        part, parts = self._part()
        num_rows, epoch = len(self.dataset) // parts, int(self._epoch)
        if not num_rows:
            raise ParamsError(
                f"{len(self.dataset)} rows cannot be divided among {parts} processes that read: "
                "start fewer ranks or DataLoader workers"
            )
        self._done = 0
        state, self._continued = self._continued, None
        if state is not None:
            if state["parts"] != parts:
                raise ParamsError(
                    f"the state was saved by {state['parts']} processes that read, now there are "
                    f"{parts}: continue with as many ranks and DataLoader workers"
                )
            if state["done"] < num_rows:  # else the next epoch is meant, which set_epoch chooses
                epoch, self._done = state["epoch"], state["done"]
                self.set_epoch(epoch)
        first = epoch * len(self.dataset) + part * num_rows
        order = _order(self.dataset, *self._order)
        while self._done < num_rows:
            count = min(_ROWS_AT_ONCE, num_rows - self._done)
            for row in self.dataset.__getitems__(order.at(first + self._done, count).tolist()):
                self._done += 1
                yield row

    def state_dict(self) -> dict[str, int]:
        """Return how far this process has come."""
        if self._continued is not None:
            return dict(self._continued)
        return {"epoch": int(self._epoch), "done": self._done, "parts": self._part()[1]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration continue after the rows that `state_dict` counted.

        If that was a whole epoch, it is the first of the epoch that `set_epoch` chooses.
        """
        self._continued = dict(state)

    def _part(self) -> tuple[int, int]:
        """Return the number of this process among those that read, and how many there are."""
        rank, world_size = self._launched
        if rank is None or world_size is None:
            distributed = torch.distributed
            running = distributed.is_available() and distributed.is_initialized()
            rank = distributed.get_rank() if running else 0
            world_size = distributed.get_world_size() if running else 1
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        return rank * workers + number, world_size * workers


def collate(rows: Sequence[Row]) -> Row:
    """Stack rows into a batch [B, ...]; rows with fewer distinct sampled ids get empty slots."""
    batch = {}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        if name.startswith(_SAMPLED):
            most = max(tensor.shape[-1] for tensor in tensors)
            tensors = [F.pad(tensor, (0, most - tensor.shape[-1])) for tensor in tensors]
        batch[name] = torch.stack(tensors)
    return batch


def model_inputs(batch: Row) -> dict[str, Any]:
    """Return the arguments of a causal language model of transformers for a batch.

    With `position_ids` that restart at each document, transformers keeps packed documents apart,
    but only without a KV cache, which it makes by default: hence `use_cache=False`.
    """
    names = ("input_ids", "position_ids")
    return {name: batch[name] for name in names if name in batch} | {"use_cache": False}


def topk_of(batch: Row, vocab_size: int) -> TopK:
    """Return the teacher's tensors of a batch as the type that losses take, TopK [B, L, ...].

    Args:
        vocab_size: rows of the student's head. With as many kept ids, nothing is outside them.
    """
    temperatures = [name.removeprefix(LSE_TAU) for name in batch if name.startswith(LSE_TAU)]
    logprobs, has_target = batch["teacher_logprobs"], batch["teacher_has_target"]
    has_row_sums, is_sampled = "teacher_lse" in batch, f"{_SAMPLED}ids" in batch
    nothing = logprobs.new_zeros(*has_target.shape, 0)
    unknown = torch.full_like(has_target, torch.nan, dtype=logprobs.dtype)
    # Shares of the samples in place of counts, since their number is not known without waiting.
    counts = batch[f"{_SAMPLED}counts"].float() if is_sampled else nothing
    return TopK(
        has_target=has_target,
        ids=batch["teacher_ids"].long(),
        logprobs=logprobs,
        lse=batch.get("teacher_lse", unknown),
        lse_tau=torch.stack([batch[LSE_TAU + tau] for tau in temperatures], -1)
        if temperatures
        else nothing,
        entropy=batch.get("teacher_entropy", unknown),
        sampled_ids=batch[f"{_SAMPLED}ids"].long() if is_sampled else nothing.long(),
        sampled_counts=counts / counts.sum(-1, keepdim=True).clamp_min(1.0),
        sampled_logprobs=batch.get(f"{_SAMPLED}logprobs", nothing),
        num_sampled=1 if is_sampled else 0,
        temperatures=tuple(map(float, temperatures)),
        vocab_size=vocab_size,
        has_row_sums=has_row_sums,
    )


def _to_tensors(topk: TopK) -> Row:
    found = {
        "teacher_has_target": topk.has_target,
        "teacher_ids": topk.ids.int(),
        "teacher_logprobs": topk.logprobs,
    }
    if topk.has_row_sums:
        found |= {"teacher_lse": topk.lse, "teacher_entropy": topk.entropy}
    for number, temperature in enumerate(topk.temperatures):
        found[f"{LSE_TAU}{temperature!r}"] = topk.lse_tau[..., number]
    if topk.num_sampled:
        found[f"{_SAMPLED}ids"] = topk.sampled_ids.int()
        found[f"{_SAMPLED}counts"] = topk.sampled_counts
        if topk.temperatures:
            found[f"{_SAMPLED}logprobs"] = topk.sampled_logprobs
    return found


def _order(dataset: CacheDataset, seed: int, shuffle_shards: int) -> ShuffledRows:
    return ShuffledRows(
        len(dataset), shard_rows=dataset.shard_rows, window_shards=shuffle_shards, seed=seed
    )


def _address(value: str | Path, key: str) -> Address:
    try:
        return in_repository(parse_address(value), key)
    except ValueError as error:
        raise MismatchError(str(error)) from None
