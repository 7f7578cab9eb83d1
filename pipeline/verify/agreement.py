"""Compare a cache with the live teacher at each position, by token id.

The cosine of sorted top-K values would prove nothing: between unrelated positions it is already
0.9988, because all sorted tails look alike. Therefore both sides are scattered by id. The sums over
the full row (lse, lse_tau, entropy) are compared too, since a wrong one would leave every
probability at temperature 1 right, but make every target at another temperature wrong. The
log-probabilities themselves are compared by bands of k, since those of the last ids hardly
affect a comparison of probabilities.

What can be compared depends on what a cache stores. The log-probabilities of sampled ids are only
stored if temperatures other than 1 are. Without them, probabilities are compared at the kept ids
alone, and sampled ids by their counts. If there are no kept ids either, the targets are the counts:
their cosine is then that of the counts, while KL, top-1 and the errors of log-probabilities are
left out (`comparable`). An imported cache knows no sums over the full row, and is not judged by
them. In the fields of `Agreement`, NaN stands for what is left out, so that it could never pass by
mistake.

Shapes: n positions, K kept ids, M sampled ids, D of them distinct, J stored temperatures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.targets.topk import TopK, sum_p_log_p
from pipeline.verify.sampled_ids import common_counts, sampled_overlap


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The agreement of the distribution `said` with `live` at each position, float32 [n]."""

    cosine: Tensor  # between probabilities scattered by id, or between counts of sampled ids
    kl: Tensor  # KL(live || said), nats, ids whose probability is not stored merged into one bucket
    top1: Tensor  # 1 where the most probable id is the same
    overlap: Tensor  # share of the kept ids that both have, of the larger number if they differ
    logprobs: Tensor  # mean |said - live| in the band of k where it is largest, nats
    lse: Tensor  # |said - live|, nats; a common offset of all logits, so noisier than lse_tau
    lse_tau: Tensor  # largest |said - live| among the temperatures, nats
    entropy: Tensor  # |said - live|, nats
    entropy_gap: Tensor  # nats, see `positions.entropy_gap`
    sampled: Tensor  # share of the sampled ids that the live teacher samples as well
    signed: Tensor  # [n, len(signed_names)], said - live, nats; 0 in a band without ids

    def map(self, function: Callable[[Tensor], Tensor]) -> Agreement:
        """Apply a tensor function to every field."""
        return Agreement(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    @staticmethod
    def cat(parts: list[Agreement]) -> Agreement:
        """Join along positions."""
        names = [field.name for field in fields(Agreement)]
        return Agreement(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})


def agreement(said: TopK, live: TopK, live_logprobs: Tensor) -> Agreement:
    """Compare two TopK of the same positions, all of which have a target.

    The cosine is over the union of both sets of kept ids. If probabilities of sampled ids are
    stored, which leave out ids by chance, it is over the ids in `said`; if only their counts are,
    it is between the counts. If only sampled ids are stored, `top1` compares the most probable of
    these. `entropy_gap`, which depends on the other positions of a row, is left out.

    Args:
        said: the cache's values, leading axis n.
        live: the teacher's values now, leading axis n, with K ids or more before a cut by top_p,
            the same temperatures and as many sampled ids.
        live_logprobs: float32 [n, ...], the teacher's log-probabilities at `said_ids`.
    """
    known, log_p = _known(said)
    p = torch.where(known, log_p.exp(), 0.0)
    q = torch.where(known, live_logprobs.exp(), 0.0)
    off = torch.where(known, log_p - live_logprobs, 0.0)
    lse, lse_tau = said.lse - live.lse, said.lse_tau - live.lse_tau
    entropy = said.entropy - live.entropy
    bands = [_mean_where(known[:, band], off[:, band]) for _, band in _bands(said)]
    sizes = [_mean_where(known[:, band], off[:, band].abs()) for _, band in _bands(said)]
    sums = [lse, *lse_tau.unbind(-1), entropy] if said.has_row_sums else []
    values = {
        "lse": lse.abs(),
        "entropy": entropy.abs(),
        "signed": torch.stack([*bands, *sums], -1),
    }
    if said.num_sampled:
        values["sampled"] = sampled_overlap(
            said.sampled_ids, said.sampled_counts, live.sampled_ids, live.sampled_counts
        )
    if said.temperatures:
        values["lse_tau"] = lse_tau.abs().amax(-1)
    if said.k:
        kept = live.prefix(said.k)
        found, q_at_kept = _found_in(said, kept)
        most = torch.maximum(said.is_kept.sum(-1), kept.is_kept.sum(-1))
        values["overlap"] = found.sum(-1) / most
    if sizes:
        values["logprobs"] = torch.stack(sizes, -1).amax(-1)
        values["kl"] = _kl(p, q, off, known.sum(-1) >= said.vocab_size)
        values["top1"] = (
            said.ids[:, 0] == live.ids[:, 0] if said.k else p.argmax(-1) == q.argmax(-1)
        ).float()
    if not sizes:
        values["cosine"] = _cosine_of_counts(said, live)
    elif _stores_sampled_logprobs(said):
        values["cosine"] = (p * q).sum(-1) / (p.norm(dim=-1) * q.norm(dim=-1))
    else:
        norm = kept.logprobs.exp().norm(dim=-1)
        values["cosine"] = (p * q_at_kept).sum(-1) / (p.norm(dim=-1) * norm)
    nothing = torch.full_like(lse, torch.nan)
    return Agreement(**{f.name: values.get(f.name, nothing) for f in fields(Agreement)})


def comparable(topk: TopK, *, entropy_quantile: float) -> list[str]:
    """Return the fields of Agreement by which a cache that stores what `topk` does is judged."""
    has_logprobs = bool(topk.k) or _stores_sampled_logprobs(topk)
    wanted = {
        "cosine": True,
        "kl": has_logprobs,
        "top1": has_logprobs,
        "overlap": bool(topk.k),
        "logprobs": has_logprobs,
        "lse": topk.has_row_sums,
        "lse_tau": bool(topk.temperatures),
        "entropy": topk.has_row_sums,
        "entropy_gap": bool(entropy_quantile),
        "sampled": bool(topk.num_sampled),
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def said_ids(topk: TopK) -> Tensor:
    """Return the slots of all ids with a stored probability, int64 [..., K] or [..., K + D]."""
    if not _stores_sampled_logprobs(topk):
        return topk.ids
    return torch.cat((topk.ids, topk.sampled_ids), -1)


def signed_names(topk: TopK) -> list[str]:
    """Return the names of the columns of `Agreement.signed`."""
    names = [f"log-probabilities of {name}" for name, _ in _bands(topk)]
    if not topk.has_row_sums:
        return names
    taus = [f"lse_tau at temperature {tau:g}" for tau in topk.temperatures]
    return [*names, "lse", *taus, "entropy"]


def _stores_sampled_logprobs(topk: TopK) -> bool:
    return bool(topk.num_sampled and topk.temperatures)


def _known(topk: TopK) -> tuple[Tensor, Tensor]:
    """Return which slots of `said_ids` hold an id, and the log-probabilities stored there."""
    kept = topk.logprobs != -torch.inf  # unlike is_kept, true of NaN, which then fails
    if not _stores_sampled_logprobs(topk):
        return kept, topk.logprobs
    known = torch.cat((kept, topk.sampled_counts > 0), -1)
    return known, torch.cat((topk.logprobs, topk.sampled_logprobs), -1)


def _bands(topk: TopK) -> list[tuple[str, slice]]:
    """Name and return bands of `said_ids`: k = 1, 2, 3 to 4, 5 to 8 and so on, then the sampled."""
    edges = [0, *(2**i for i in range(topk.k.bit_length()) if 2**i < topk.k), topk.k]
    bands = [(f"k = {a + 1} to {b}", slice(a, b)) for a, b in pairwise(edges) if a < b]
    if _stores_sampled_logprobs(topk):
        bands.append(("sampled ids", slice(topk.k, None)))
    return bands


def _mean_where(which: Tensor, values: Tensor) -> Tensor:
    """Return the mean [n] of the values [n, s] of some slots, the others being 0; 0 if of none."""
    return values.sum(-1) / which.sum(-1).clamp_min(1)


def _kl(p: Tensor, q: Tensor, off: Tensor, is_all: Tensor) -> Tensor:
    """Return KL(q || p) over known ids and the bucket of the others.

    Args:
        p, q: probabilities [n, s], 0 in empty slots.
        off: log p - log q, [n, s], 0 in empty slots.
        is_all: bool [n], where the known ids are the whole vocabulary, so that the bucket is empty.
    """
    tiny = torch.finfo(torch.float32).tiny
    live_tail = (1.0 - q.sum(-1)).clamp_min(0.0)
    # float16 rounds a log-probability by up to 2^-11 of itself, and so the sum of probabilities by
    # up to 2^-11 times their entropy: what is left may be 0 or less where the tail is not.
    rounding = -sum_p_log_p(p) / 2**11
    known = p.sum(-1)
    said_tail = torch.maximum(1.0 - known, rounding).clamp_min(tiny)
    tail = live_tail * (live_tail.clamp_min(tiny).log() - said_tail.log())
    # The sum by which said is divided, so that KL is not negative.
    total = known + said_tail.masked_fill(is_all, 0.0)
    return tail.masked_fill(is_all, 0.0) - (q * off).sum(-1) + total.log()


def _cosine_of_counts(said: TopK, live: TopK) -> Tensor:
    one, other = said.sampled_counts.float(), live.sampled_counts.float()
    common = common_counts(said.sampled_ids, live.sampled_ids, live.sampled_counts)
    cosine: Tensor = (one * common).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))
    return cosine


def _found_in(said: TopK, live: TopK) -> tuple[Tensor, Tensor]:
    """Return bool [n, K], whether each id that `said` keeps is kept in `live`, and its probability.

    The probability is 0 where it is not.
    """
    by_id, order = live.ids.masked_fill(~live.is_kept, live.vocab_size).sort(-1)
    place = torch.searchsorted(by_id, said.ids).clamp_max(live.k - 1)
    found = (by_id.gather(-1, place) == said.ids) & said.is_kept
    q = live.logprobs.exp().gather(-1, order.gather(-1, place))
    return found, torch.where(found, q, 0.0)
