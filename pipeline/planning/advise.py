"""Measure what each K would keep and cost on a small sample, to choose prepare.k before a capture.

Rows spread evenly over the training split go through the teacher once, at the largest K; the
smaller K are prefixes of it. Three quantities are measured for each K:

    retained mass    sum of the K kept probabilities at each temperature, mean over positions
    nats lost        the part of the teacher's entropy that lies inside the bucket of all other ids
                     (`nats_lost`); a student cannot learn it from the cache
    bytes per token  size of the data that a cache would hold, without sampled ids and without
                     the corpus's own tokens

They are measured, not modelled: the sample is encoded by the cache's own codec in chunks of
prepare.chunk_rows. If it is smaller than a chunk, the chunk is filled with zeros, as in a cache's
last shard; they compress to almost nothing.

The duration of a capture, and the number of epochs from which it is cheaper than an online teacher,
are estimated from the rates at prepare.k on up to prepare.shard_rows rows of the sample
(`EpochCosts`).

Shapes: B rows, L length, K kept ids, n positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.capture.capture import COUNTED_ROWS
from pipeline.config.cache_params import AdviseParams, PrepareParams
from pipeline.config.params import Params
from pipeline.config.resolved import resolve
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import PADDING, Rows
from pipeline.errors import ParamsError
from pipeline.io.zarr_shards import decode_shard, encode_shard
from pipeline.logit_cache.codec import IdOrder, decode, encode, to_topk
from pipeline.logit_cache.format import Fingerprint
from pipeline.logit_cache.layout import CacheLayout, id_order_name
from pipeline.model.attention_mask import documents_apart
from pipeline.runtime.batch_sizes import resolve_batch_rows
from pipeline.runtime.console import (
    announce,
    progress,
    progress_bar,
)
from pipeline.targets.reduce import row_uniforms
from pipeline.targets.topk import TopK, nats_lost
from pipeline.teacher.teacher import Teacher

ENOUGH_MASS = 0.95  # the recommended K keeps at least this much
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class KeptAtK:
    """The benefit and cost of one K: means over the sample's positions that are not padding."""

    k: int
    retained_mass: dict[float, float]  # by temperature
    nats_lost: float  # at temperature 1
    bytes_a_token: float
    corpus_bytes: float  # for all positions of the training split


@dataclass(frozen=True, kw_only=True)
class EpochCosts:
    """Seconds of one epoch over the training split at prepare.k, estimated from the sample."""

    forward: float  # teacher and head alone; the logits are discarded
    top_k: float  # with the reduction to TopK: the cost of an online teacher
    encode: float  # compressing the result of top_k
    decode: float  # from compressed bytes in memory to TopK: the cost of a cached run instead

    @property
    def capture(self) -> float:
        """Seconds of a capture without overlap: the encoding thread takes the teacher's cores."""
        return self.top_k + self.encode


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The results for the sample."""

    rows: int  # rows examined
    positions: int  # positions in these rows, padding included
    corpus_rows: int  # rows of the training split
    corpus_positions: int
    kept: tuple[KeptAtK, ...]  # by ascending K
    left_out: tuple[int, ...]  # K beyond the vocabulary
    costs: EpochCosts
    prepare_k: int  # the K at which the costs were measured
    epochs_per_run: float  # epochs over the training split in a run of train.*
    temperature: float  # of the recommendation: train.temperature if it is stored, else 1
    break_even_epochs: int | None  # None: an online teacher is never more expensive

    @property
    def recommended(self) -> KeptAtK | None:
        """The smallest K that keeps ENOUGH_MASS at `temperature`; None if no K does."""
        enough = (k for k in self.kept if k.retained_mass[self.temperature] >= ENOUGH_MASS)
        return next(enough, None)

    @property
    def break_even_runs(self) -> int | None:
        """Number of training runs of train.* after which the cache has paid for itself."""
        if self.break_even_epochs is None:
            return None
        return math.ceil(self.break_even_epochs / self.epochs_per_run)

    def metrics(self) -> dict[str, Any]:
        """Return the contents of metrics.json."""
        best = self.recommended
        by_k = [
            asdict(kept)
            | {"retained_mass": {f"{tau:g}": mass for tau, mass in kept.retained_mass.items()}}
            for kept in self.kept
        ]
        return {
            "sample": {"rows": self.rows, "positions": self.positions},
            "corpus": {"rows": self.corpus_rows, "positions": self.corpus_positions},
            "kept": by_k,
            "left_out": self.left_out,
            "pass_seconds": asdict(self.costs) | {"capture": self.costs.capture},
            "break_even_epochs": self.break_even_epochs,
            "break_even_runs": self.break_even_runs,
            "recommended_k": None if best is None else best.k,
        }


def advise(
    teacher: Teacher, corpus: CorpusSplit, fingerprint: Fingerprint, params: Params
) -> Advice:
    """Examine a sample of a split.

    Args:
        fingerprint: fingerprint of the cache that `prepare` would make from the split.

    Raises:
        ParamsError: every K of advise.ks exceeds the vocabulary.
    """
    ks, left_out = usable_ks(params.advise.ks, fingerprint.vocab_size)
    blocks = sample_blocks(len(corpus), params.advise, params.prepare.shard_rows)
    looked_at = f"{sum(map(len, blocks))} of {len(corpus):,} rows"
    announce("advise", f"examines {looked_at} with {teacher.describe()}")
    costs = _measure_costs(teacher, corpus, fingerprint, params, blocks[0])
    kept = _measure_kept(teacher, corpus, fingerprint, params, blocks, ks)
    rows, length = sum(map(len, blocks)), fingerprint.row_length
    stored = {1.0, *fingerprint.temperatures}  # temperature 1 needs no normaliser
    resolved = resolve(params, train_rows=len(corpus), num_ids=corpus.info.vocab_size)
    wanted = resolved.train
    return Advice(
        rows=rows,
        positions=rows * length,
        corpus_rows=len(corpus),
        corpus_positions=len(corpus) * length,
        kept=kept,
        left_out=left_out,
        costs=costs,
        prepare_k=fingerprint.k,
        epochs_per_run=wanted.num_steps
        * wanted.batch_rows
        * wanted.gradient_accumulation_steps
        / len(corpus),
        temperature=wanted.temperature if wanted.temperature in stored else 1.0,
        break_even_epochs=break_even_epochs(costs.capture, costs.top_k, costs.decode),
    )


def usable_ks(ks: Iterable[int], vocab_size: int) -> tuple[list[int], tuple[int, ...]]:
    """Return the K up to the size of the vocabulary, ascending, and those beyond it.

    Raises:
        ParamsError: all K are beyond the vocabulary.
    """
    ordered = sorted(set(ks))
    usable = [k for k in ordered if k <= vocab_size]
    if not usable:
        raise ParamsError(
            f"advise.ks={ordered} all exceed the {vocab_size} ids of the vocabulary: lower one"
        )
    return usable, tuple(ordered[len(usable) :])


def sample_blocks(num_rows: int, params: AdviseParams, shard_rows: int) -> list[list[int]]:
    """Choose evenly spread rows to examine, in blocks of up to one shard, which limit the memory.

    The first block is itself spread evenly over the split, since only this block is used for rates
    and id orders; the other blocks are in corpus order.
    """
    number = min(num_rows, max(params.min_rows, math.ceil(params.sample * num_rows)))
    places = np.arange(number) * num_rows // number
    num_blocks = -(-number // shard_rows)
    blocks = [places[::num_blocks]]
    if num_blocks > 1:
        rest = np.delete(places, slice(None, None, num_blocks))
        blocks += np.array_split(rest, num_blocks - 1)
    return [block.tolist() for block in blocks]


def break_even_epochs(capture: float, online: float, read: float) -> int | None:
    """Return the number of epochs, counted across all runs, from which on a cache pays.

    This is the smallest integer R with capture + R read <= R online. The student's own steps cost
    the same either way and cancel out. It is None if reading takes as long as the teacher, since
    then a cache never pays.

    Args:
        capture: seconds to make the cache once.
        online: seconds per epoch of the online teacher.
        read: seconds per epoch of reading the cache.
    """
    if read >= online:
        return None
    return math.ceil(capture / (online - read))


class _Meter:
    """Sums for one K over the sample's blocks; the first block gives the id order."""

    def __init__(self, k: int, fingerprint: Fingerprint, prepare: PrepareParams) -> None:
        self._made_from = replace(fingerprint, k=k, num_sampled=0)
        self._prepare = prepare
        self._mass = dict.fromkeys(sorted({1.0, *fingerprint.temperatures}), 0.0)
        self._nats = 0.0
        self._real = self._stored = self._bytes = 0
        self._id_order: IdOrder | None = None

    def add(self, topk: TopK, real: Tensor) -> None:
        """Add a block.

        Args:
            topk: [B, L, ...], with this K or a larger one.
            real: bool [B, L], False at padding.
        """
        kept = topk.prefix(self._made_from.k)
        if self._id_order is None:
            self._id_order = _id_order_of(kept)
        layout = _layout_of(self._made_from, self._prepare, self._id_order, rows=len(real))
        self._bytes += sum(map(len, _to_objects(kept, self._id_order, layout).values()))
        self._stored += real.numel()
        counted = kept[real]
        self._real += len(counted.lse)
        self._nats += float(nats_lost(counted).sum())
        for temperature in self._mass:
            _, tail_mass = counted.target(temperature)
            self._mass[temperature] += float((1.0 - tail_mass.double()).sum())

    def result(self, corpus_positions: int) -> KeptAtK:
        """Return means over all blocks, and the size of a cache of `corpus_positions` positions."""
        bytes_a_token = self._bytes / self._stored
        return KeptAtK(
            k=self._made_from.k,
            retained_mass={tau: mass / self._real for tau, mass in self._mass.items()},
            nats_lost=self._nats / self._real,
            bytes_a_token=bytes_a_token,
            corpus_bytes=bytes_a_token * corpus_positions,
        )


def _measure_kept(
    teacher: Teacher,
    corpus: CorpusSplit,
    fingerprint: Fingerprint,
    params: Params,
    blocks: list[list[int]],
    ks: list[int],
) -> tuple[KeptAtK, ...]:
    """Run the teacher once over all blocks at the largest K, the last of `ks`; one result per K."""
    meters = [_Meter(k, fingerprint, params.prepare) for k in ks]
    batch_rows = resolve_batch_rows(
        params.capture.batch_rows, fingerprint.row_length, teacher.device.type
    )
    positions = sum(map(len, blocks)) * fingerprint.row_length
    with progress_bar(what="advise", total=positions, unit="tok") as bar:
        for block in blocks:
            rows = _rows_at(corpus, block)
            parts: list[TopK] = []
            for tokens, doc_ids in _batches(rows, batch_rows, fingerprint):
                wanted = (ks[-1], fingerprint.temperatures)
                parts.append(teacher.begin_top_k(tokens, *wanted, doc_ids=doc_ids)())
                bar.update(tokens.numel())
            topk, real = TopK.cat(parts), torch.from_numpy(rows.doc_ids != PADDING)
            for meter in meters:
                meter.add(topk, real)
    return tuple(meter.result(len(corpus) * fingerprint.row_length) for meter in meters)


def _measure_costs(
    teacher: Teacher,
    corpus: CorpusSplit,
    fingerprint: Fingerprint,
    params: Params,
    block: list[int],
) -> EpochCosts:
    """Time a capture, and reading it back, on the rows of a block."""
    rows = _rows_at(corpus, block)
    length, num_sampled = fingerprint.row_length, fingerprint.num_sampled
    uniforms = row_uniforms(block, length, num_sampled, fingerprint.sampling_seed)
    batch_rows = resolve_batch_rows(params.capture.batch_rows, length, teacher.device.type)
    chances = torch.split(uniforms, batch_rows)

    def top_k(tokens: Tensor, doc_ids: Tensor | None, chance: Tensor) -> TopK:
        wanted = (fingerprint.k, fingerprint.temperatures)
        return teacher.begin_top_k(tokens, *wanted, chance, doc_ids)()

    batches = list(zip(_batches(rows, batch_rows, fingerprint), chances, strict=True))
    (tokens, doc_ids), chance = batches[0]  # a warm-up, since the very first call is slow
    top_k(tokens[:1], None if doc_ids is None else doc_ids[:1], chance[:1])
    forward, reduced, parts = 0.0, 0.0, []
    for (tokens, doc_ids), chance in progress(batches, what="advise: rates", unit="batch"):
        seconds, _ = _timed(partial(_forward, teacher, tokens, doc_ids))
        forward += seconds
        seconds, part = _timed(partial(top_k, tokens, doc_ids, chance))
        reduced += seconds
        parts.append(part)
    topk = TopK.cat(parts)
    id_order = _id_order_of(topk)
    layout = _layout_of(fingerprint, params.prepare, id_order, rows=len(block))
    encoded, objects = _timed(lambda: _to_objects(topk, id_order, layout))
    decoded, _ = _timed(lambda: _from_objects(objects, id_order, layout))
    blocks = len(corpus) / len(block)
    return EpochCosts(
        forward=forward * blocks,
        top_k=reduced * blocks,
        encode=encoded * blocks,
        decode=decoded * blocks,
    )


def _forward(teacher: Teacher, tokens: Tensor, doc_ids: Tensor | None) -> float:
    """Run teacher and head over a batch; reading one logit makes sure that a GPU has finished."""
    seen = [logits[-1, -1].clone() for _, logits in teacher.logits_by_chunk(tokens, doc_ids)]
    return float(seen[-1])


def _timed(function: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def _rows_at(corpus: CorpusSplit, places: list[int]) -> Rows:
    return Rows.cat([corpus.rows(place, place + 1) for place in places])


def _batches(
    rows: Rows, batch_rows: int, fingerprint: Fingerprint
) -> list[tuple[Tensor, Tensor | None]]:
    """Return each batch's tokens, int64 [up to batch_rows, L], and documents to be kept apart."""
    tokens = torch.split(torch.from_numpy(rows.tokens), batch_rows)
    doc_ids = torch.split(torch.from_numpy(rows.doc_ids), batch_rows)
    apart = [documents_apart(ids, fingerprint.document_mask) for ids in doc_ids]
    return list(zip(tokens, apart, strict=True))


def _id_order_of(topk: TopK) -> IdOrder:
    """Make the id order of a block [B, L, ...] from a few evenly spaced rows.

    An order of all rows would fit the sample better than a capture's fits a corpus: it gave
    150.4 bytes per token, where the cache then took 153.7; an order of as many rows as a capture
    counts gave 152.5 (SmolLM2, K = 64, 16 of 782 rows).
    """
    number = min(COUNTED_ROWS, len(topk.ids))
    return IdOrder.of(topk[torch.arange(number) * len(topk.ids) // number])


def _layout_of(
    fingerprint: Fingerprint, prepare: PrepareParams, id_order: IdOrder, *, rows: int
) -> CacheLayout:
    """Return the layout of a one-shard cache for a block of rows, with the chunks of `prepare`."""
    whole_chunks = -(-rows // prepare.chunk_rows) * prepare.chunk_rows
    return CacheLayout(
        fingerprint=replace(fingerprint, num_rows=rows),
        chunk_rows=prepare.chunk_rows,
        shard_rows=whole_chunks,
        id_order=id_order_name(id_order),
    )


def _to_objects(topk: TopK, id_order: IdOrder, layout: CacheLayout) -> dict[str, bytes]:
    """Encode a block as the cache stores it, by array."""
    arrays = encode(topk, id_order, layout.fingerprint, layout.chunk_rows)
    return {name: encode_shard(spec, arrays[name]) for name, spec in layout.specs.items()}


def _from_objects(objects: dict[str, bytes], id_order: IdOrder, layout: CacheLayout) -> TopK:
    """Decode a block as a training run does."""
    chunks = {name: decode_shard(spec, objects[name], 0) for name, spec in layout.specs.items()}
    return to_topk(decode(chunks, layout.fingerprint), id_order, layout.fingerprint)
