"""The gate, which checks that a cache agrees with its teacher.

Sampled rows are run through the teacher again and compared by token id (agreement.py), at the
positions that have a target. The teacher's head only runs at positions in the loss, and rows
without any are left out. Three caches are compared with the same live teacher:

    cache            the values that are stored
    noise floor      the values that the teacher would store now, run with another batch shape; no
                     cache can be expected to agree better. If another engine captured the cache
                     than runs the live teacher, it is the one to compute these values, so that the
                     floor contains the difference between the two engines
    shifted by one   the cache, whose targets are those of the preceding position that has one; it
                     must fail, otherwise the gate is blind

Errors of probabilities, log-probabilities, ids and sums over the row are judged by their means, in
the worst row, and position by position. Their limits follow from the noise floor (limits.py): in
float32 an entropy off by 0.001 nats is detected, while the noise of half formats is tolerated.

The positions of the targets, and the number of sampled ids at each of them, must be exact, except
that noise may change which positions have the highest entropies (positions.py).

Sampled ids must equal those that the recorded seed gives now, as far as the noise floor's sampled
ids do, and must be a sample of the live distribution (sampled_ids.py).

Rows are taken from every shard, as far as verify.batches allows. If they are too few (100 rows
cover half of 200 shards), the result says which faults would have been detected (power.py).

Shapes: n positions, B rows, L length, K kept ids, M sampled ids, V valid vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import ceil

import numpy as np
import torch
from torch import Tensor

from pipeline.config.cache_params import VerifyParams
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import Rows, positions_in_loss
from pipeline.errors import DecantError
from pipeline.logit_cache.codec import as_stored
from pipeline.logit_cache.format import Fingerprint
from pipeline.logit_cache.reader import CacheReader
from pipeline.model.attention_mask import documents_apart
from pipeline.runtime.console import announce, progress
from pipeline.runtime.device import seconds_of
from pipeline.targets.block_search import sample_by_inversion
from pipeline.targets.reduce import row_uniforms, top_k_from_logits
from pipeline.targets.selection import count_distinct
from pipeline.targets.topk import TopK
from pipeline.teacher.teacher import Teacher
from pipeline.verify.agreement import Agreement, agreement, comparable, said_ids, signed_names
from pipeline.verify.gate_report import (
    FitTest,
    Found,
    GateReport,
    GateSummary,
    HistogramBin,
    Limits,
)
from pipeline.verify.limits import (
    QUANTITIES,
    Compared,
    allowed_positions,
    failures_of,
    limits_from,
    smallest_found,
)
from pipeline.verify.positions import entropy_gap, misplaced
from pipeline.verify.power import reach, spread
from pipeline.verify.sampled_ids import SampleSums, fit_tests, sample_sums


@dataclass(frozen=True)
class Place:
    """A row of a split, with positions in the loss."""

    reader: CacheReader  # of the split
    row: int
    num_wanted: int  # number of these positions

    def __str__(self) -> str:
        return f"row {self.row} of {self.reader.corpus.split}"


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows of the corpus, and the cache's values for them."""

    made_from: Fingerprint
    tokens: Tensor  # int64 [B, L]
    apart: Tensor | None  # [B, L], ids of the documents to be kept apart
    wanted: Tensor  # bool [B, L], the positions in the loss
    uniforms: Tensor  # [B, L, M]
    stored: TopK  # [B, L, ...]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The positions of one batch that have a target."""

    agreement: Agreement
    sums: SampleSums | None
    rows: Tensor
    columns: Tensor


def run_gate(
    teacher: Teacher,
    splits: Sequence[tuple[CorpusSplit, CacheReader]],
    params: VerifyParams,
    *,
    seed: int,
    noise_teacher: Teacher | None = None,
    engines: tuple[str, str] | None = None,
) -> tuple[GateReport, list[HistogramBin]]:
    """Recompute sampled rows of all splits and judge the cache.

    Args:
        teacher: the live teacher.
        noise_teacher: the teacher in the engine that captured the cache; None: the live teacher.
        engines: names of the engines of `noise_teacher` and of the live teacher; None: the cache's.
    """
    readers = [reader for _, reader in splits]
    places, shards = _sample(readers, params.batches * params.batch_rows, seed)
    batches = [places[i : i + params.batch_rows] for i in range(0, len(places), params.batch_rows)]
    noisy = _noisy(batches, params.noise_batches)
    _announce(teacher, batches, len(noisy))
    cached: list[_Part] = []
    noise: list[_Part] = []
    control: list[_Part] = []
    wrong: list[dict[str, Tensor]] = []
    for number, batch in enumerate(progress(batches, what="verify", unit="batch")):
        inputs, first = _read(batch), number * params.batch_rows
        said = {"cache": inputs.stored}
        if number in noisy:
            said["noise"] = _capture_again(noise_teacher or teacher, inputs)
            said["control"] = _shifted_by_one(inputs.stored)
        parts = _compare(teacher, inputs, list(said.values()), first)
        for series, part in zip((cached, noise, control), parts, strict=False):
            series.append(part)
        wrong.append(_wrong_by_row(inputs))
    of_cache, of_noise, of_control = (
        _joined(series, inputs) for series in (cached, noise, control)
    )
    if not len(of_cache) or not len(of_control):
        raise DecantError(
            f"{readers[0].address} holds no target in rows that have positions in the loss, for "
            f"example {places[0]}: capture it again with stages/prepare.py --overwrite"
        )
    made_from = readers[0].fingerprint
    limits = limits_from(
        of_noise,
        len(of_cache),
        params,
        k=made_from.k,
        num_sampled=made_from.num_sampled,
        top_p=made_from.top_p,
    )
    calls = list(map(str, places))
    tests, failures = _judge_samples(cached, of_cache)
    failures = [*_judge_exactly(wrong, calls), *failures_of(of_cache, limits, calls), *failures]
    if not failures_of(of_control, limits, calls):
        failures.append(
            "the negative control, targets shifted by one, passed, so the gate could not detect "
            "a shift"
        )
    report = GateReport(
        batches=len(batches),
        rows=len(places),
        tokens=len(of_cache),
        capture_engine=made_from.engine,
        noise_engine=engines[0] if engines else made_from.engine,
        live_engine=engines[1] if engines else made_from.engine,
        cache=_summary(of_cache),
        noise_floor=_summary(of_noise),
        negative_control=_summary(of_control),
        limits=limits,
        sampling_tests={test.name: test for test in tests},
        found=_found(
            of_noise,
            limits,
            tests,
            shards=shards,
            rows=len(places),
            positions=len(of_cache),
            batch_rows=params.batch_rows,
        ),
        failures=failures,
    )
    histogram = _histogram(
        {"cache": of_cache, "noise floor": of_noise, "shifted by one": of_control}
    )
    return report, histogram


def _sample(readers: Sequence[CacheReader], wanted: int, seed: int) -> tuple[list[Place], int]:
    """Return the rows to examine, and the number of shards in the splits.

    A row without a position in the loss is replaced by another of its shard, or left out.

    Raises:
        DecantError: none of the rows has a position in the loss.
    """
    sizes = []
    for reader in readers:
        bounds = map(reader.layout.rows_of, range(reader.layout.num_shards))
        sizes += [stop - start for start, stop in bounds]
    ends = np.cumsum([len(reader.corpus) for reader in readers])
    chosen = spread(sizes, wanted, seed)
    places, taken = [], set(chosen)
    for row in chosen:
        number = int(np.searchsorted(ends, row, side="right"))
        reader = readers[number]
        before = int(ends[number]) - len(reader.corpus)
        place = _place(reader, row - before, before, taken)
        if place is not None:
            places.append(place)
            taken.add(place.row + before)
    if not places:
        raise DecantError(
            f"none of {len(chosen):,} rows has a position in the loss, so there is nothing to "
            "compare: raise verify.batches, or check which tokens of the corpus are in the loss"
        )
    return places, len(sizes)


def _place(reader: CacheReader, row: int, before: int, taken: set[int]) -> Place | None:
    """Return a row, or else the next one of its shard that is not taken, with a position.

    Args:
        before: number of rows in the splits before the reader's; `taken` counts these, too.
    """
    start, stop = reader.layout.rows_of(row // reader.layout.shard_rows)
    others = ((row + i - start) % (stop - start) + start for i in range(1, stop - start))
    for other in chain((row,), (other for other in others if before + other not in taken)):
        if number := int(positions_in_loss(reader.corpus.rows(other, other + 1)).sum()):
            return Place(reader, other, number)
    return None


def _noisy(batches: Sequence[Sequence[Place]], wanted: int) -> set[int]:
    """Choose evenly the batches that measure noise floor and control, which is shifted by one.

    Raises:
        DecantError: no batch has two positions, without which nothing can be shifted.
    """
    able = [i for i, batch in enumerate(batches) if sum(place.num_wanted for place in batch) > 1]
    if not able:
        raise DecantError(
            "each batch has a single position in the loss, so the control cannot be shifted by "
            "one: raise verify.batch_rows"
        )
    return {able[i * len(able) // wanted] for i in range(wanted)}


def _read(places: Sequence[Place]) -> _Batch:
    rows = Rows.cat([place.reader.corpus.rows(place.row, place.row + 1) for place in places])
    doc_ids = torch.from_numpy(rows.doc_ids)
    made_from = places[0].reader.fingerprint
    length, num_sampled, seed = made_from.row_length, made_from.num_sampled, made_from.sampling_seed
    return _Batch(
        made_from=made_from,
        tokens=torch.from_numpy(rows.tokens),
        apart=documents_apart(doc_ids, made_from.document_mask),
        wanted=positions_in_loss(rows),
        uniforms=row_uniforms([place.row for place in places], length, num_sampled, seed),
        stored=TopK.cat([place.reader.top_k(np.array([place.row])) for place in places]),
    )


def _capture_again(teacher: Teacher, batch: _Batch) -> TopK:
    """Return the values that the teacher would store now, [B, L, ...].

    Each row is run three times: another batch shape gives other matrix shapes, hence another order
    of rounding.
    """
    made_from = batch.made_from
    again = teacher.top_k(
        batch.tokens.repeat(3, 1),
        made_from.k,
        made_from.temperatures,
        batch.uniforms.repeat(3, 1, 1),
        None if batch.apart is None else batch.apart.repeat(3, 1),
        top_p=made_from.top_p,
        wanted=batch.wanted.repeat(3, 1),
        entropy_quantile=made_from.entropy_quantile,
    )
    stored = as_stored(again[: len(batch.tokens)].map(Tensor.cpu))
    return replace(stored, has_row_sums=batch.stored.has_row_sums)


def _shifted_by_one(topk: TopK) -> TopK:
    """Move each target to the next position that has one."""
    has_target = topk.has_target
    moved = topk[has_target].map(lambda t: t.roll(1, dims=0))
    return moved.spread(has_target.flatten().nonzero()[:, 0], has_target.shape)


def _compare(teacher: Teacher, batch: _Batch, said: Sequence[TopK], first: int) -> list[_Part]:
    """Run one forward pass of the live teacher, and compare each cache of `said` with it.

    Args:
        first: the number of the batch's first row among those examined.
    """
    made_from = batch.made_from
    row, column = batch.wanted.nonzero(as_tuple=True)
    wanted = batch.wanted.flatten().nonzero()[:, 0]
    flat = [topk.map(lambda t: t.flatten(0, 1)[wanted].to(teacher.device)) for topk in said]
    uniforms = batch.uniforms.flatten(0, 1)[wanted].to(teacher.device)
    found: list[list[Agreement]] = [[] for _ in said]
    sums: list[SampleSums] = []  # of the first cache
    entropy: list[Tensor] = []
    for rows, logits in teacher.logits_by_chunk(batch.tokens, batch.apart, wanted):
        live = top_k_from_logits(
            logits, max(1, made_from.k), made_from.temperatures, top_p=made_from.top_p
        )
        entropy.append(live.entropy)
        for topk, parts in zip(flat, found, strict=True):
            part = topk[rows]
            at_said = logits.gather(-1, said_ids(part)) - live.lse[:, None]
            if part.num_sampled:
                weights = torch.sub(logits, live.lse[:, None]).exp_().scatter_(-1, part.ids, 0.0)
                ids, counts = count_distinct(sample_by_inversion(weights, uniforms[rows]))
                live = replace(live, sampled_ids=ids, sampled_counts=counts)
                if topk is flat[0]:
                    sums.append(
                        sample_sums(
                            weights, part.sampled_ids, part.sampled_counts, part.num_sampled
                        )
                    )
            parts.append(agreement(part, live, at_said))
    gap = entropy_gap(
        torch.zeros(batch.wanted.shape).masked_scatter(batch.wanted, torch.cat(entropy).cpu()),
        batch.wanted,
        made_from.entropy_quantile,
    )[batch.wanted]
    of_samples = [SampleSums.cat(sums) if sums else None, *(None for _ in said[1:])]
    return [
        _part(
            replace(Agreement.cat(parts), entropy_gap=gap),
            of_sample,
            topk.has_target,
            rows=row + first,
            columns=column,
        )
        for parts, of_sample, topk in zip(found, of_samples, flat, strict=True)
    ]


def _part(
    found: Agreement,
    sums: SampleSums | None,
    has_target: Tensor,
    *,
    rows: Tensor,
    columns: Tensor,
) -> _Part:
    """Select the positions with a target, and move them to the CPU."""

    def chosen(tensor: Tensor) -> Tensor:
        return tensor.cpu()[has_target.cpu()]

    return _Part(
        agreement=found.map(chosen),
        sums=None if sums is None else sums.map(chosen),
        rows=chosen(rows),
        columns=chosen(columns),
    )


def _wrong_by_row(batch: _Batch) -> dict[str, Tensor]:
    """Count what noise does not excuse in each row: int64 [B], by words for it."""
    stored, made_from = batch.stored, batch.made_from
    k, num_sampled = made_from.k, made_from.num_sampled
    wrong = {
        "targets are missing, or at positions that have none": misplaced(
            stored.has_target, batch.wanted, made_from.entropy_quantile
        )
    }
    if k and made_from.top_p is None and not made_from.imported_from:
        is_other = stored.is_kept.sum(-1) != k
        wrong[f"positions do not keep k={k} ids"] = (stored.has_target & is_other).sum(-1)
    if num_sampled:
        is_other = stored.sampled_counts.sum(-1) != num_sampled
        words = f"positions have sampled ids whose counts do not add up to {num_sampled}"
        wrong[words] = (stored.has_target & is_other).sum(-1)
    return wrong


def _joined(parts: Sequence[_Part], batch: _Batch) -> Compared:
    names = comparable(batch.stored, entropy_quantile=batch.made_from.entropy_quantile)
    return Compared(
        agreement=Agreement.cat([part.agreement for part in parts]),
        rows=torch.cat([part.rows for part in parts]),
        columns=torch.cat([part.columns for part in parts]),
        signed_names=signed_names(batch.stored),
        quantities=[quantity for quantity in QUANTITIES if quantity.name in names],
    )


def _judge_exactly(wrong: Sequence[dict[str, Tensor]], calls: Sequence[str]) -> list[str]:
    """Return a sentence for each fault that `_wrong_by_row` counted."""
    failures = []
    for words in wrong[0]:
        by_row = torch.cat([of_batch[words] for of_batch in wrong])
        if total := int(by_row.sum()):
            failures.append(f"{total:,} {words}, most of them in {calls[int(by_row.argmax())]}")
    return failures


def _judge_samples(parts: Sequence[_Part], cache: Compared) -> tuple[list[FitTest], list[str]]:
    """Test whether the stored sampled ids are a sample of the live distribution."""
    of_batches = [part.sums for part in parts if part.sums is not None]
    if not of_batches:
        return [], []
    sums = SampleSums.cat(of_batches)
    tests = fit_tests(sums, cache.rows, cache.columns)
    failures = [
        f"sampled ids: {test.name} {test.value:.3f} is not within {test.low:.3f} to {test.high:.3f}"
        for test in tests
        if not test.passed
    ]
    if impossible := int(sums.impossible.sum()):
        failures.append(
            f"{impossible:,} sampled ids are among the kept ids, outside which they belong"
        )
    return tests, failures


def _found(
    noise: Compared,
    limits: Limits,
    tests: Sequence[FitTest],
    *,
    shards: int,
    rows: int,
    positions: int,
    batch_rows: int,
) -> Found:
    errors, signed = smallest_found(noise, limits, rows)
    how_much = reach(
        shards=shards, rows=rows, positions=positions, allowed=allowed_positions(positions)
    )
    return Found(
        errors=errors,
        signed=signed,
        sampled={test.name: test.found for test in tests},
        wrong_positions=how_much.wrong_positions,
        wrong_shards=how_much.wrong_shards,
        shards=shards,
        shards_seen=how_much.shards_seen,
        batches_for={what: ceil(wanted / batch_rows) for what, wanted in how_much.rows_for.items()},
    )


def _announce(teacher: Teacher, batches: Sequence[Sequence[Place]], noisy: int) -> None:
    row = _read(batches[0][:1])
    a_row = seconds_of(lambda: _compare(teacher, row, [row.stored], 0), teacher.device)
    announce(
        "verify",
        f"recomputes {len(batches)} batches of the cache by {teacher.describe()}",
        a_row * len(batches[0]) * (len(batches) + 3 * noisy),
    )


def _summary(series: Compared) -> GateSummary:
    means = {
        quantity.name: float(getattr(series.agreement, quantity.name).double().mean())
        for quantity in series.quantities
    }
    return GateSummary(
        mean_cosine=means["cosine"],
        min_cosine=float(series.agreement.cosine.min()),
        worst_row_cosine=float(series.row_means(series.agreement.cosine)[1].min()),
        mean_kl=means.get("kl"),
        max_kl=float(series.agreement.kl.max()) if "kl" in means else None,
        top1=means.get("top1"),
        overlap=means.get("overlap"),
        logprob_error=means.get("logprobs"),
        lse_error=means.get("lse"),
        lse_tau_error=means.get("lse_tau"),
        entropy_error=means.get("entropy"),
        entropy_gap=means.get("entropy_gap"),
        sampled_agreement=means.get("sampled"),
    )


def _histogram(series: dict[str, Compared]) -> list[HistogramBin]:
    """Return each series' share of positions by log10(1 - cosine), in bins of half a decade."""
    edges = np.arange(-8.0, 0.5, 0.5)
    found = []
    for name, compared in series.items():
        distance = (1.0 - compared.agreement.cosine.double().numpy()).clip(1e-8, 1.0)
        counts, _ = np.histogram(np.log10(distance), bins=edges)
        for low, count in zip(edges[:-1], counts, strict=True):
            share = float(count) / len(distance)
            found.append(HistogramBin(series=name, log10_one_minus_cosine=float(low), share=share))
    return found
