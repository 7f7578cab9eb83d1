"""The gate: does the cache say what the teacher says?

Sampled rows are run through the teacher again and compared with the cache by TOKEN ID. The cosine
of sorted top-K values would prove nothing: between unrelated positions it is already 0.9988,
because all sorted tails look alike. So both sides are scattered by id and probabilities are
compared. The sums over the full row (lse, lse_tau, entropy) are compared too: a wrong one would
leave every probability at temperature 1 right and every target at another temperature wrong.

Two more numbers say how to read the first. The noise floor compares the teacher with itself at
another batch shape: no cache can do better. The negative control compares the cache with the
teacher one position away, as a cache shifted by one would; it must FAIL the same thresholds, else
the gate is blind.

Shapes: n positions, K ids, V valid vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import VerifyParams
from pipeline.data.packing import PADDING, Rows
from pipeline.data.rows import CorpusSplit
from pipeline.model.attention import documents_apart
from pipeline.runtime.console import announce, progress
from pipeline.runtime.device import seconds_of
from pipeline.store.reader import CacheReader
from pipeline.teacher.hf import HuggingFaceTeacher
from pipeline.topk import TopK, top_k_from_logits


@dataclass(frozen=True)
class Agreement:
    """Per position, float32 [n]: how the distribution `said` agrees with `live`."""

    cosine: Tensor  # of probabilities scattered by id
    kl: Tensor  # KL(live || said), nats, ids outside said's top K merged into one bucket
    top1: Tensor  # 1 where the most probable id is the same
    overlap: Tensor  # share of the K ids both have
    lse: Tensor  # |said - live|, nats; a common offset of all logits, so noisier than the next
    normalisers: Tensor  # largest |said - live| among the lse_tau and entropy, nats

    @staticmethod
    def cat(parts: list[Agreement]) -> Agreement:
        """Join along positions."""
        names = [field.name for field in fields(Agreement)]
        return Agreement(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})


@dataclass(frozen=True, kw_only=True)
class GateSummary:
    """Means over positions; `worst_batch_cosine` is the lowest mean cosine of a batch."""

    mean_cosine: float
    min_cosine: float
    worst_batch_cosine: float
    mean_kl: float
    max_kl: float
    top1: float
    overlap: float
    lse_error: float  # nats
    normaliser_error: float  # of lse_tau and entropy, nats


@dataclass(frozen=True)
class GateReport:
    """What the gate found."""

    cache: GateSummary
    noise: GateSummary
    control: GateSummary
    failures: tuple[str, ...]  # sentences; empty when the gate passes
    histogram: list[dict[str, Any]]  # rows of series, log10_one_minus_cosine, share
    batches: int
    tokens: int

    @property
    def passed(self) -> bool:
        """Whether the cache may be used."""
        return not self.failures

    def metrics(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "passed": self.passed,
            "batches": self.batches,
            "tokens": self.tokens,
            "cache": asdict(self.cache),
            "noise_floor": asdict(self.noise),
            "negative_control": asdict(self.control),
        }


def agreement(said: TopK, live: TopK, live_logprobs: Tensor) -> Agreement:
    """Compare two TopK of the same positions.

    Without draws the cosine is over the union of both sets of ids. With draws, which leave out ids
    by chance, it is over the ids that are said; where nothing but draws is stored, `top1` asks for
    the most probable of these, and `overlap`, of which there is none, is 1.

    Args:
        said: leading axis n; what the cache says. live: likewise, the teacher now, of K + M ids
            or more, at the same temperatures.
        live_logprobs: float32 [n, K + M], the teacher's log-probabilities at `said_ids`.
    """
    known = _first_of_each(said)
    log_p = torch.cat((said.logprobs, said.draw_logprobs), -1)
    p = torch.where(known, log_p.exp(), 0.0)
    at_known = torch.where(known, live_logprobs.exp(), 0.0)
    same_id, q_at_said = _found_in(said.ids, live.prefix(max(1, said.k)))
    if said.draws:
        dot, other_norm = (p * at_known).sum(-1), at_known.norm(dim=-1)
    else:
        dot, other_norm = (p * q_at_said).sum(-1), live.logprobs.exp().norm(dim=-1)
    tiny = torch.finfo(torch.float32).tiny
    live_tail = (1.0 - at_known.sum(-1)).clamp_min(0.0)
    said_tail = (1.0 - p.sum(-1)).clamp_min(tiny)
    tail = live_tail * (live_tail.clamp_min(tiny).log() - said_tail.log())
    kl = (at_known * (live_logprobs - log_p)).sum(-1)
    if said.k < said.vocab_size:
        kl = kl + tail
    if said.k:
        top1, overlap = said.ids[:, 0] == live.ids[:, 0], same_id.float().mean(-1)
    else:
        top1, overlap = p.argmax(-1) == at_known.argmax(-1), torch.ones_like(kl)
    off = torch.cat((said.lse_tau - live.lse_tau, (said.entropy - live.entropy)[:, None]), -1)
    return Agreement(
        cosine=dot / (p.norm(dim=-1) * other_norm),
        kl=kl,
        top1=top1.float(),
        overlap=overlap,
        lse=(said.lse - live.lse).abs(),
        normalisers=off.abs().amax(-1),
    )


def said_ids(topk: TopK) -> Tensor:
    """All ids whose probability is stored, int64 [..., K + M]; draws may repeat."""
    return torch.cat((topk.ids, topk.draw_ids), -1)


def _found_in(ids: Tensor, live: TopK) -> tuple[Tensor, Tensor]:
    """Bool [n, K], whether each of `ids` is among live's, and its probability there, else 0."""
    by_id, order = live.ids.sort(-1)
    place = torch.searchsorted(by_id, ids).clamp_max(live.k - 1)
    found = by_id.gather(-1, place) == ids
    q = live.logprobs.exp().gather(-1, order.gather(-1, place))
    return found, torch.where(found, q, 0.0)


def _first_of_each(topk: TopK) -> Tensor:
    """Bool [n, K + M], False where a draw repeats an earlier one."""
    by_id, order = topk.draw_ids.sort(stable=True, dim=-1)
    repeats = torch.zeros_like(by_id, dtype=torch.bool)
    repeats[:, 1:] = by_id[:, 1:] == by_id[:, :-1]
    repeated = torch.empty_like(repeats).scatter_(-1, order, repeats)
    return torch.cat((torch.ones_like(topk.ids, dtype=torch.bool), ~repeated), -1)


def run_gate(
    teacher: HuggingFaceTeacher,
    splits: Sequence[tuple[CorpusSplit, CacheReader]],
    params: VerifyParams,
    *,
    seed: int,
) -> GateReport:
    """Recompute sampled rows of all splits and judge the cache by the thresholds of `params`.

    Rows are drawn one a stratum over the whole corpus, so no shard of any size escapes by chance.
    """
    ends = np.cumsum([len(corpus) for corpus, _ in splits])
    chosen = []
    for place in _stratified(int(ends[-1]), params.batches * params.batch_rows, seed):
        number = int(np.searchsorted(ends, place, side="right"))
        chosen.append((splits[number], place - int(ends[number]) + len(splits[number][0])))
    batches = [chosen[i : i + params.batch_rows] for i in range(0, len(chosen), params.batch_rows)]
    _announce(teacher, batches, params)
    cached: list[Agreement] = []
    noise: list[Agreement] = []
    control: list[Agreement] = []
    for number, batch in enumerate(progress(batches, what="verify", unit="batch")):
        rows = Rows.cat([corpus.rows(row, row + 1) for (corpus, _), row in batch])
        tokens, doc_ids = torch.from_numpy(rows.tokens), torch.from_numpy(rows.doc_ids)
        real = doc_ids != PADDING
        apart = documents_apart(doc_ids, batch[0][0][1].fingerprint.attention)
        stored = TopK.cat([reader.top_k(np.array([row])) for (_, reader), row in batch])
        shifted = stored.map(lambda t: t.roll(1, dims=1))
        wanted = [said_ids(stored), said_ids(shifted)]
        live, (at_stored, at_shifted) = _live(teacher, tokens, apart, wanted, stored.temperatures)
        cached.append(_compare(stored, live, at_stored, real))
        if number < params.noise_batches:
            control.append(_compare(shifted, live, at_shifted, real))
            # Another batch shape makes other matrix shapes, hence another order of rounding.
            thrice = None if apart is None else apart.repeat(3, 1)
            wanted = [live.ids.repeat(3, 1, 1)]
            again, (at_live,) = _live(
                teacher, tokens.repeat(3, 1), thrice, wanted, stored.temperatures
            )
            again, at_live = again[: len(tokens)], at_live[: len(tokens)]
            noise.append(_compare(live, again, at_live, real))
    cache_summary, noise_summary, control_summary = map(_summary, (cached, noise, control))
    failures = _failures(cache_summary, params)
    if not _failures(control_summary, params):
        failures.append("the negative control, targets shifted by one, passed: the gate is blind")
    return GateReport(
        cache=cache_summary,
        noise=noise_summary,
        control=control_summary,
        failures=tuple(failures),
        histogram=_histogram({"cache": cached, "noise floor": noise, "shifted by one": control}),
        batches=len(batches),
        tokens=sum(len(part.cosine) for part in cached),
    )


def _announce(
    teacher: HuggingFaceTeacher,
    batches: list[list[tuple[tuple[CorpusSplit, CacheReader], int]]],
    params: VerifyParams,
) -> None:
    (corpus, reader), row = batches[0][0]
    rows = corpus.rows(row, row + 1)
    tokens, doc_ids = torch.from_numpy(rows.tokens), torch.from_numpy(rows.doc_ids)
    apart = documents_apart(doc_ids, reader.fingerprint.attention)
    stored = reader.top_k(np.array([row]))
    wanted = [said_ids(stored)] * 2
    a_row = seconds_of(
        lambda: _live(teacher, tokens, apart, wanted, stored.temperatures), teacher.device
    )
    again = 3 * min(params.noise_batches, len(batches))
    announce(
        "verify",
        f"recomputes {len(batches)} batches of the cache by {teacher.describe()}",
        a_row * params.batch_rows * (len(batches) + again),
    )


def _live(
    teacher: HuggingFaceTeacher,
    tokens: Tensor,
    doc_ids: Tensor | None,
    id_sets: Sequence[Tensor],
    temperatures: tuple[float, ...],
) -> tuple[TopK, list[Tensor]]:
    """One forward: the teacher's TopK [B, L, K] and its log-probabilities at each set of ids.

    Args:
        tokens: int64 [B, L]. doc_ids: of documents to be kept apart, or None.
        id_sets: int64 [B, L, K] each.
    """
    flat_ids = [ids.flatten(0, 1).to(teacher.device) for ids in id_sets]
    k = min(id_sets[0].shape[-1], teacher.vocab_size)
    parts: list[TopK] = []
    gathered: list[list[Tensor]] = [[] for _ in id_sets]
    for rows, logits in teacher.logits_by_chunk(tokens, doc_ids):
        for ids, found in zip(flat_ids, gathered, strict=True):
            found.append(logits.gather(-1, ids[rows]))
        topk = top_k_from_logits(logits, k, temperatures)
        parts.append(topk)
        for found in gathered:
            found[-1] -= topk.lse[:, None]
    shape = tuple(tokens.shape)
    live = TopK.cat(parts).map(lambda t: t.view(*shape, *t.shape[1:]).cpu())
    return live, [torch.cat(found).view(*shape, -1).cpu() for found in gathered]


def _compare(said: TopK, live: TopK, live_logprobs: Tensor, real: Tensor) -> Agreement:
    """`agreement` of the positions that are not padding, in float32 on the CPU."""
    return agreement(said[real], live[real], live_logprobs[real])


def _stratified(size: int, wanted: int, seed: int) -> list[int]:
    """min(wanted, size) different indices below `size`, one from each of equal strata."""
    wanted = min(wanted, size)
    edges = np.arange(wanted + 1) * size // wanted
    generator = np.random.default_rng(seed)
    return [int(generator.integers(a, b)) for a, b in itertools.pairwise(edges)]


def _summary(parts: list[Agreement]) -> GateSummary:
    whole = Agreement.cat(parts)
    return GateSummary(
        mean_cosine=float(whole.cosine.mean()),
        min_cosine=float(whole.cosine.min()),
        worst_batch_cosine=min(float(part.cosine.mean()) for part in parts),
        mean_kl=float(whole.kl.mean()),
        max_kl=float(whole.kl.max()),
        top1=float(whole.top1.mean()),
        overlap=float(whole.overlap.mean()),
        lse_error=float(whole.lse.mean()),
        normaliser_error=float(whole.normalisers.mean()),
    )


def _failures(summary: GateSummary, params: VerifyParams) -> list[str]:
    """A sentence for each threshold that is not met; NaN meets none."""
    error_limit = params.max_normaliser_error
    checks = [
        ("mean cosine", summary.mean_cosine, ">=", params.min_mean_cosine),
        ("worst batch's cosine", summary.worst_batch_cosine, ">=", params.min_batch_cosine),
        ("mean KL", summary.mean_kl, "<=", params.max_mean_kl),
        ("top-1 agreement", summary.top1, ">=", params.min_top1),
        ("overlap of ids", summary.overlap, ">=", params.min_overlap),
        ("mean error of lse", summary.lse_error, "<=", params.max_lse_error),
        ("mean error of lse_tau and entropy", summary.normaliser_error, "<=", error_limit),
    ]
    return [
        f"{name} {value:.6f} is not {sign} {limit:g}"
        for name, value, sign, limit in checks
        if not (value >= limit if sign == ">=" else value <= limit)
    ]


def _histogram(series: dict[str, list[Agreement]]) -> list[dict[str, Any]]:
    """Share of positions by log10(1 - cosine), half a decade a bin, for each series."""
    edges = np.arange(-8.0, 0.5, 0.5)
    rows = []
    for name, parts in series.items():
        distance = (1.0 - Agreement.cat(parts).cosine.double().numpy()).clip(1e-8, 1.0)
        counts, _ = np.histogram(np.log10(distance), bins=edges)
        for low, count in zip(edges[:-1], counts, strict=True):
            share = float(count) / len(distance)
            rows.append({"series": name, "log10_one_minus_cosine": float(low), "share": share})
    return rows
