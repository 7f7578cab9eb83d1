"""The gate, which checks that a cache agrees with its teacher.

Sampled rows are run through the teacher again and compared by token id (agreement.py). Three caches
are compared with the same live teacher:

    cache            the values that are stored
    noise floor      the values that the teacher would store now, run with another batch shape; no
                     cache can be expected to agree better. If another engine captured the cache
                     than runs the live teacher, it is the one to compute these values, so that the
                     floor contains the difference between the two engines
    shifted by one   the cache, one position off; it must fail, otherwise the gate is blind

Errors of probabilities, log-probabilities, ids and sums over the row are judged by their means, in
the worst row, and position by position. Their limits follow from the noise floor (limits.py): in
float32 an error of 0.001 nats is detected, while the noise of half formats is tolerated.

Sampled ids must equal those that the recorded seed gives now, as far as the noise floor's sampled
ids do, and must be a sample of the live distribution (sampled_ids.py).

Rows are taken from every shard, as far as verify.batches allows. If they are too few (100 rows
cover half of 200 shards), the result says which faults would have been detected (power.py).

Shapes: n positions, B rows, L length, K kept ids, M sampled ids, V valid vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import torch
from torch import Tensor

from pipeline.config.cache_params import VerifyParams
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import PADDING, Rows
from pipeline.logit_cache.codec import as_stored
from pipeline.logit_cache.reader import CacheReader
from pipeline.model.attention_mask import documents_apart
from pipeline.runtime.console import announce, progress
from pipeline.runtime.device import seconds_of
from pipeline.targets.block_search import sample_by_inversion
from pipeline.targets.reduce import row_uniforms, top_k_from_logits
from pipeline.targets.topk import TopK
from pipeline.teacher.teacher import Teacher
from pipeline.verify.agreement import Agreement, agreement, said_ids, signed_names
from pipeline.verify.gate_report import (
    FitTest,
    Found,
    GateReport,
    GateSummary,
    HistogramBin,
    Limits,
)
from pipeline.verify.limits import (
    Compared,
    allowed_positions,
    failures_of,
    limits_from,
    smallest_found,
)
from pipeline.verify.power import reach, spread
from pipeline.verify.sampled_ids import SampleSums, fit_tests, sample_sums

Place = tuple[CacheReader, int]
"""A row of a split: the split's reader, and the number of the row."""


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows of the corpus, and the cache's values for them."""

    tokens: Tensor  # int64 [B, L]
    apart: Tensor | None  # [B, L], ids of the documents to be kept apart
    real: Tensor  # bool [B, L], False at padding
    uniforms: Tensor  # [B, L, M]
    stored: TopK  # [B, L, ...]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The positions of one batch, without padding."""

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
    noisy = set(np.arange(params.noise_batches) * len(batches) // params.noise_batches)
    _announce(teacher, batches, len(noisy))
    cached: list[_Part] = []
    noise: list[_Part] = []
    control: list[_Part] = []
    for number, batch in enumerate(progress(batches, what="verify", unit="batch")):
        inputs, first = _read(batch), number * params.batch_rows
        said = {"cache": inputs.stored}
        if number in noisy:
            said["noise"] = _capture_again(noise_teacher or teacher, inputs)
            said["control"] = inputs.stored.map(lambda t: t.roll(1, dims=1))
        parts = _compare(teacher, inputs, list(said.values()), first)
        for series, part in zip((cached, noise, control), parts, strict=False):
            series.append(part)
    names = signed_names(inputs.stored)
    of_cache, of_noise, of_control = (_joined(s, names) for s in (cached, noise, control))
    made_from = readers[0].fingerprint
    limits = limits_from(
        of_noise, len(of_cache), params, k=made_from.k, num_sampled=made_from.num_sampled
    )
    calls = [f"row {row} of {reader.corpus.split}" for reader, row in places]
    tests, failures = _judge_samples(cached, of_cache)
    failures = [*failures_of(of_cache, limits, calls), *failures]
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
    """Return the rows to examine, and the number of shards in the splits."""
    sizes = []
    for reader in readers:
        bounds = map(reader.layout.rows_of, range(reader.layout.num_shards))
        sizes += [stop - start for start, stop in bounds]
    ends = np.cumsum([len(reader.corpus) for reader in readers])
    places = []
    for row in spread(sizes, wanted, seed):
        number = int(np.searchsorted(ends, row, side="right"))
        reader = readers[number]
        places.append((reader, row - int(ends[number]) + len(reader.corpus)))
    return places, len(sizes)


def _read(places: Sequence[Place]) -> _Batch:
    rows = Rows.cat([reader.corpus.rows(row, row + 1) for reader, row in places])
    doc_ids = torch.from_numpy(rows.doc_ids)
    made_from = places[0][0].fingerprint
    length, num_sampled, seed = made_from.row_length, made_from.num_sampled, made_from.sampling_seed
    return _Batch(
        tokens=torch.from_numpy(rows.tokens),
        apart=documents_apart(doc_ids, made_from.document_mask),
        real=doc_ids != PADDING,
        uniforms=row_uniforms([row for _, row in places], length, num_sampled, seed),
        stored=TopK.cat([reader.top_k(np.array([row])) for reader, row in places]),
    )


def _capture_again(teacher: Teacher, batch: _Batch) -> TopK:
    """Return the values that the teacher would store now, [B, L, ...].

    Each row is run three times: another batch shape gives other matrix shapes, hence another order
    of rounding.
    """
    stored = batch.stored
    again = teacher.top_k(
        batch.tokens.repeat(3, 1),
        stored.k,
        stored.temperatures,
        batch.uniforms.repeat(3, 1, 1),
        None if batch.apart is None else batch.apart.repeat(3, 1),
    )
    return as_stored(again[: len(batch.tokens)].map(Tensor.cpu))


def _compare(teacher: Teacher, batch: _Batch, said: Sequence[TopK], first: int) -> list[_Part]:
    """Run one forward pass of the live teacher, and compare each cache of `said` with it.

    Args:
        first: the number of the batch's first row among those examined.
    """
    flat = [topk.map(lambda t: t.flatten(0, 1).to(teacher.device)) for topk in said]
    uniforms = batch.uniforms.flatten(0, 1).to(teacher.device)
    found: list[list[Agreement]] = [[] for _ in said]
    sums: list[SampleSums] = []
    for rows, logits in teacher.logits_by_chunk(batch.tokens, batch.apart):
        k = min(max(1, said[0].k + said[0].num_sampled), teacher.vocab_size)
        live = top_k_from_logits(logits, k, said[0].temperatures)
        for topk, parts in zip(flat, found, strict=True):
            part = topk[rows]
            at_said = logits.gather(-1, said_ids(part)) - live.lse[:, None]
            if part.num_sampled:
                weights = torch.sub(logits, live.lse[:, None]).exp_().scatter_(-1, part.ids, 0.0)
                live = replace(live, sampled_ids=sample_by_inversion(weights, uniforms[rows]))
                if topk is flat[0]:
                    sums.append(sample_sums(weights, part.sampled_ids))
            parts.append(agreement(part, live, at_said))
    row, column = torch.meshgrid(*(torch.arange(n) for n in batch.tokens.shape), indexing="ij")
    real = batch.real.flatten()
    return [
        _Part(
            agreement=Agreement.cat(parts).map(lambda t: t.cpu()[real]),
            sums=SampleSums.cat(sums).map(lambda t: t.cpu()[real]) if sums else None,
            rows=row.flatten()[real] + first,
            columns=column.flatten()[real],
        )
        for parts in found
    ]


def _joined(parts: Sequence[_Part], names: list[str]) -> Compared:
    return Compared(
        agreement=Agreement.cat([part.agreement for part in parts]),
        rows=torch.cat([part.rows for part in parts]),
        columns=torch.cat([part.columns for part in parts]),
        signed_names=names,
    )


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
        name: float(getattr(series.agreement, name).double().mean())
        for name in ("cosine", "kl", "top1", "overlap", "logprobs", "lse", "lse_tau", "entropy")
    }
    return GateSummary(
        mean_cosine=means["cosine"],
        min_cosine=float(series.agreement.cosine.min()),
        worst_row_cosine=float(series.row_means(series.agreement.cosine)[1].min()),
        mean_kl=means["kl"],
        max_kl=float(series.agreement.kl.max()),
        top1=means["top1"],
        overlap=means["overlap"],
        logprob_error=means["logprobs"],
        lse_error=means["lse"],
        lse_tau_error=means["lse_tau"],
        entropy_error=means["entropy"],
        sampled_agreement=float(series.agreement.sampled.double().mean()),
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
