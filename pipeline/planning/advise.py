"""Measure what a cache would keep and cost on a small sample, to choose prepare.* before a capture.

Rows spread evenly over the training split go through the teacher once, and each chunk of logits is
reduced to all that is compared: the values of K in advise.ks, and the modes of `modes_to_compare`
(a cut to a mass, sampled ids, positions of high entropy). Measured for each:

    retained mass    sum of the kept probabilities at each temperature, mean over positions
    nats lost        the part of the teacher's entropy that lies inside the bucket of all other ids
                     (`nats_lost`); a student cannot learn it from the cache
    bytes per token  size of the data that a cache would hold, over all tokens of the rows, without
                     the corpus's own tokens

Mass and nats are means over the positions with a target: those in the loss, or those of them that
prepare.positions chooses. With sampled ids, the expectation of a target is the teacher's full
distribution, so all mass is retained and no nats are lost, on average over the draws.

Sizes are measured, not modelled: the sample is encoded by the cache's own codec in chunks of
prepare.chunk_rows. If it is smaller than a chunk, the chunk is filled with zeros, as in a cache's
last shard; they compress to almost nothing.

The duration of a capture, and the number of epochs from which it is cheaper than an online teacher,
are estimated from the rates of prepare.* on up to prepare.shard_rows rows of the sample
(`EpochCosts`).

Shapes: B rows, L length, K kept ids, M sampled ids, n positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.capture.capture import COUNTED_ROWS, begin_top_k_of
from pipeline.config.cache_params import AdviseParams, PrepareParams
from pipeline.config.params import Params
from pipeline.config.resolved import resolve
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import Rows, positions_in_loss
from pipeline.errors import ParamsError
from pipeline.io.zarr_shards import decode_shard, encode_shard
from pipeline.logit_cache.codec import IdOrder, decode, encode, to_topk
from pipeline.logit_cache.format import Fingerprint
from pipeline.logit_cache.layout import CacheLayout, id_order_name
from pipeline.model.attention_mask import documents_apart
from pipeline.planning.cache_size import Mode
from pipeline.runtime.batch_sizes import resolve_batch_rows
from pipeline.runtime.console import announce, progress, progress_bar
from pipeline.runtime.transfer import to_device
from pipeline.targets.reduce import row_uniforms, top_k_from_logits
from pipeline.targets.selection import cut_to_mass, keep_highest_entropy
from pipeline.targets.topk import TopK, nats_lost
from pipeline.teacher.teacher import Teacher

ENOUGH_MASS = 0.95  # the recommended K keeps at least this much
TOP_PS = (0.9, 0.95, 0.99)  # the cuts to a mass that are compared
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The benefit and cost of one mode, on the sample."""

    mode: Mode
    positions: float  # share of the positions that have a target; what follows are means over these
    num_ids: float  # kept and distinct sampled ids per position
    retained_mass: dict[float, float]  # by temperature; with sampled ids, the expectation
    nats_lost: float  # at temperature 1; with sampled ids, the expectation
    bytes_a_token: float  # over all positions
    bytes_at_one: float  # the same if prepare.temperatures were [1.0]
    corpus_bytes: float  # for all positions of the training split


@dataclass(frozen=True, kw_only=True)
class EpochCosts:
    """Seconds of one epoch over the training split with prepare.*, estimated from the sample."""

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
    kept: tuple[Kept, ...]  # the K most probable ids alone, by ascending K
    modes: tuple[Kept, ...]  # that of prepare.* first, whose costs were measured, then others
    left_out: tuple[int, ...]  # K beyond the vocabulary
    costs: EpochCosts
    epochs_per_run: float  # epochs over the training split in a run of train.*
    temperature: float  # of the recommendation: train.temperature if it is stored, else 1
    break_even_epochs: int | None  # None: an online teacher is never more expensive

    @property
    def share_in_loss(self) -> float:
        """Share of the sample's positions that are in the loss."""
        return self.kept[0].positions

    @property
    def recommended(self) -> Kept | None:
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
        return {
            "sample": {"rows": self.rows, "positions": self.positions},
            "corpus": {"rows": self.corpus_rows, "positions": self.corpus_positions},
            "share_in_loss": self.share_in_loss,
            "kept": [_metrics_of(kept) for kept in self.kept],
            "modes": [_metrics_of(kept) for kept in self.modes],
            "left_out": self.left_out,
            "pass_seconds": asdict(self.costs) | {"capture": self.costs.capture},
            "break_even_epochs": self.break_even_epochs,
            "break_even_runs": self.break_even_runs,
            "recommended_k": None if best is None else best.mode.k,
        }


def _metrics_of(kept: Kept) -> dict[str, Any]:
    values = asdict(kept)
    mode = values.pop("mode")
    masses = {f"{tau:g}": mass for tau, mass in kept.retained_mass.items()}
    return {"name": kept.mode.name, **mode, **values, "retained_mass": masses}


def advise(
    teacher: Teacher, corpus: CorpusSplit, fingerprint: Fingerprint, params: Params
) -> Advice:
    """Examine a sample of a split.

    Args:
        fingerprint: fingerprint of the cache that `prepare` would make from the split.

    Raises:
        ParamsError: every K of advise.ks exceeds the vocabulary, or no position of the sample is in
            the loss.
    """
    ks, left_out = usable_ks(params.advise.ks, fingerprint.vocab_size)
    modes = modes_to_compare(params.prepare, fingerprint.vocab_size)
    blocks = sample_blocks(len(corpus), params.advise, params.prepare.shard_rows)
    if not any(len(_inputs_of(_rows_at(corpus, block), fingerprint)[2]) for block in blocks):
        raise ParamsError(
            f"no position of the {sum(map(len, blocks))} rows in the sample is in the loss: raise "
            "advise.min_rows or advise.sample"
        )
    looked_at = f"{sum(map(len, blocks))} of {len(corpus):,} rows"
    announce("advise", f"examines {looked_at} with {teacher.describe()}")
    costs = _measure_costs(teacher, corpus, fingerprint, params, blocks[0])
    wanted = [*(Mode(k=k) for k in ks), *modes]
    kept = _measure_kept(teacher, corpus, fingerprint, params, blocks, wanted)
    rows, length = sum(map(len, blocks)), fingerprint.row_length
    stored = {1.0, *fingerprint.temperatures}  # temperature 1 needs no normaliser
    resolved = resolve(params, train_rows=len(corpus), num_ids=corpus.info.vocab_size)
    train = resolved.train
    return Advice(
        rows=rows,
        positions=rows * length,
        corpus_rows=len(corpus),
        corpus_positions=len(corpus) * length,
        kept=kept[: len(ks)],
        modes=kept[len(ks) :],
        left_out=left_out,
        costs=costs,
        epochs_per_run=train.num_steps
        * train.batch_rows
        * train.gradient_accumulation_steps
        / len(corpus),
        temperature=train.temperature if train.temperature in stored else 1.0,
        break_even_epochs=break_even_epochs(costs.capture, costs.top_k, costs.decode),
    )


def modes_to_compare(prepare: PrepareParams, vocab_size: int) -> list[Mode]:
    """Return the mode of prepare.*, then others that a user may choose instead."""
    here = Mode.of(prepare)
    cuts = [Mode(k=here.k, top_p=top_p) for top_p in TOP_PS] if here.k else []
    sampled = [Mode(k=k, num_sampled=m) for k, m in ((0, 25), (0, 50), (32, 16)) if k <= vocab_size]
    certain_left_out = replace(here, entropy_quantile=prepare.entropy_quantile)
    return list(dict.fromkeys([here, *cuts, *sampled, certain_left_out]))


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
    """Sums for one mode over the sample's blocks; the first block gives the id order."""

    def __init__(self, mode: Mode, fingerprint: Fingerprint, prepare: PrepareParams) -> None:
        self._mode = mode
        self._made_from = replace(fingerprint, **asdict(mode))
        self._prepare = prepare
        self._mass = dict.fromkeys(sorted({1.0, *fingerprint.temperatures}), 0.0)
        self._nats = 0.0
        self._targets = self._positions = self._ids = self._bytes = self._bytes_at_one = 0
        self._id_order: IdOrder | None = None

    def add(self, topk: TopK) -> None:
        """Add a block of this mode, [B, L, ...]."""
        if self._id_order is None:
            self._id_order = _id_order_of(topk)
        self._bytes += self._size_of(topk, self._made_from)
        at_one = replace(
            topk,
            temperatures=(),
            lse_tau=topk.lse_tau[..., :0],
            sampled_logprobs=topk.sampled_logprobs[..., :0],
        )
        self._bytes_at_one += self._size_of(at_one, replace(self._made_from, temperatures=()))
        self._positions += topk.lse.numel()
        counted = topk[topk.has_target]
        self._targets += len(counted.lse)
        self._ids += int(counted.is_kept.sum()) + int((counted.sampled_counts > 0).sum())
        if self._mode.num_sampled:
            return
        self._nats += float(nats_lost(counted).sum())
        for temperature in self._mass:
            _, tail_mass = counted.target(temperature)
            self._mass[temperature] += float((1.0 - tail_mass.double()).sum())

    def _size_of(self, topk: TopK, made_from: Fingerprint) -> int:
        assert self._id_order is not None
        layout = _layout_of(made_from, self._prepare, self._id_order, rows=len(topk.lse))
        return sum(map(len, _to_objects(topk, self._id_order, layout).values()))

    def result(self, corpus_positions: int) -> Kept:
        """Return means over all blocks, and the size of a cache of `corpus_positions` positions."""
        bytes_a_token = self._bytes / self._positions
        mass = {tau: total / self._targets for tau, total in self._mass.items()}
        return Kept(
            mode=self._mode,
            positions=self._targets / self._positions,
            num_ids=self._ids / self._targets,
            retained_mass=dict.fromkeys(mass, 1.0) if self._mode.num_sampled else mass,
            nats_lost=self._nats / self._targets,
            bytes_a_token=bytes_a_token,
            bytes_at_one=self._bytes_at_one / self._positions,
            corpus_bytes=bytes_a_token * corpus_positions,
        )


def _measure_kept(
    teacher: Teacher,
    corpus: CorpusSplit,
    fingerprint: Fingerprint,
    params: Params,
    blocks: list[list[int]],
    modes: Sequence[Mode],
) -> tuple[Kept, ...]:
    """Run the teacher once over all blocks; one result per mode."""
    largest = max(mode.k for mode in modes if not mode.num_sampled)
    sources = {mode: _source_of(mode, largest) for mode in modes}
    meters = {mode: _Meter(mode, fingerprint, params.prepare) for mode in modes}
    batch_rows = resolve_batch_rows(
        params.capture.batch_rows, fingerprint.row_length, teacher.device.type
    )
    positions = sum(map(len, blocks)) * fingerprint.row_length
    with progress_bar(what="advise", total=positions, unit="tok") as bar:
        for block in blocks:
            parts: dict[Mode, list[TopK]] = {source: [] for source in sources.values()}
            for first in range(0, len(block), batch_rows):
                places = block[first : first + batch_rows]
                for source, topk in _reduce(teacher, corpus, fingerprint, places, parts).items():
                    parts[source].append(topk)
                bar.update(len(places) * fingerprint.row_length)
            found = {source: TopK.cat(topks) for source, topks in parts.items()}
            for mode, meter in meters.items():
                meter.add(_cut(found[sources[mode]], mode))
    return tuple(meters[mode].result(len(corpus) * fingerprint.row_length) for mode in modes)


def _source_of(mode: Mode, largest: int) -> Mode:
    """Return what the logits are reduced to for a mode; the top K are all cut from the largest."""
    return replace(mode, entropy_quantile=0.0) if mode.num_sampled else Mode(k=largest)


def _reduce(
    teacher: Teacher,
    corpus: CorpusSplit,
    fingerprint: Fingerprint,
    places: list[int],
    modes: Iterable[Mode],
) -> dict[Mode, TopK]:
    """Run the teacher over a batch of rows and reduce its logits once for each mode."""
    rows = _rows_at(corpus, places)
    tokens, doc_ids, positions = _inputs_of(rows, fingerprint)
    length, seed = fingerprint.row_length, fingerprint.sampling_seed
    chances = {
        mode: row_uniforms(places, length, mode.num_sampled, seed).flatten(0, 1)[positions]
        for mode in modes
    }
    parts: dict[Mode, list[TopK]] = {mode: [] for mode in chances}
    for chunk, logits in teacher.logits_by_chunk(tokens, doc_ids, positions):
        for mode, uniforms in chances.items():
            chance = to_device(uniforms[chunk], teacher.device)
            topk = top_k_from_logits(logits, mode.k, fingerprint.temperatures, chance, mode.top_p)
            parts[mode].append(topk.map(Tensor.cpu))
    found = {mode: TopK.cat(topks) for mode, topks in parts.items()}
    teacher.require_finite(next(iter(found.values())))
    return {mode: topk.spread(positions, tokens.shape) for mode, topk in found.items()}


def _cut(topk: TopK, mode: Mode) -> TopK:
    """Cut what `_reduce` returned for the source of a mode, [B, L, ...], to the mode."""
    if not mode.num_sampled:
        topk = topk.prefix(mode.k)
        flat = topk.ids.flatten(0, 1), topk.logprobs.flatten(0, 1)
        ids, logprobs = cut_to_mass(*flat, mode.top_p)
        topk = replace(topk, ids=ids.view_as(topk.ids), logprobs=logprobs.view_as(topk.logprobs))
    return keep_highest_entropy(topk, mode.entropy_quantile)


def _measure_costs(
    teacher: Teacher,
    corpus: CorpusSplit,
    fingerprint: Fingerprint,
    params: Params,
    block: list[int],
) -> EpochCosts:
    """Time a capture, and reading it back, on the rows of a block."""
    rows = _rows_at(corpus, block)
    batch_rows = resolve_batch_rows(
        params.capture.batch_rows, fingerprint.row_length, teacher.device.type
    )
    batches = [rows[first : first + batch_rows] for first in range(0, len(block), batch_rows)]
    # A warm-up, since the very first call is slow
    _top_k(teacher, fingerprint, rows[:1])
    forward, reduced, parts = 0.0, 0.0, []
    for batch in progress(batches, what="advise: rates", unit="batch"):
        seconds, _ = _timed(partial(_forward, teacher, fingerprint, batch))
        forward += seconds
        seconds, part = _timed(partial(_top_k, teacher, fingerprint, batch))
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


def _forward(teacher: Teacher, fingerprint: Fingerprint, rows: Rows) -> float:
    """Run teacher and head over a batch; reading one logit makes sure that a GPU has finished."""
    chunks = teacher.logits_by_chunk(*_inputs_of(rows, fingerprint))
    return float(torch.cat([logits[-1:, -1].clone() for _, logits in chunks]).sum())


def _top_k(teacher: Teacher, fingerprint: Fingerprint, rows: Rows) -> TopK:
    """Run a batch as prepare does, with the first rows' samples, since only the time counts."""
    return begin_top_k_of(teacher, fingerprint, rows, 0)()


def _timed(function: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def _rows_at(corpus: CorpusSplit, places: list[int]) -> Rows:
    return Rows.cat([corpus.rows(place, place + 1) for place in places])


def _inputs_of(rows: Rows, fingerprint: Fingerprint) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return tokens, documents to keep apart, and the flattened batch's positions in the loss."""
    tokens, doc_ids = torch.from_numpy(rows.tokens), torch.from_numpy(rows.doc_ids)
    positions = positions_in_loss(rows).flatten().nonzero()[:, 0]
    return tokens, documents_apart(doc_ids, fingerprint.document_mask), positions


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
