"""Compare a cache with the live teacher at each position, by token id.

The cosine of sorted top-K values would prove nothing: between unrelated positions it is already
0.9988, because all sorted tails look alike. Therefore both sides are scattered by id. The sums over
the full row (lse, lse_tau, entropy) are compared too, since a wrong one would leave every
probability at temperature 1 right, but make every target at another temperature wrong. The
log-probabilities themselves are compared by bands of k, since those of the last ids hardly
affect a comparison of probabilities.

Shapes: n positions, K kept ids, M sampled ids, J stored temperatures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.targets.topk import TopK
from pipeline.verify.sampled_ids import sampled_overlap


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The agreement of the distribution `said` with `live` at each position, float32 [n]."""

    cosine: Tensor  # between probabilities scattered by id
    kl: Tensor  # KL(live || said), nats, ids outside said's top K merged into one bucket
    top1: Tensor  # 1 where the most probable id is the same
    overlap: Tensor  # share of the K ids that both have
    logprobs: Tensor  # mean |said - live| in the band of k where it is largest, nats
    lse: Tensor  # |said - live|, nats; a common offset of all logits, so noisier than lse_tau
    lse_tau: Tensor  # largest |said - live| among the temperatures, nats
    entropy: Tensor  # |said - live|, nats
    sampled: Tensor  # share of the sampled ids that the live teacher samples as well
    signed: Tensor  # [n, len(signed_names)], said - live, nats

    def map(self, function: Callable[[Tensor], Tensor]) -> Agreement:
        """Apply a tensor function to every field."""
        return Agreement(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    @staticmethod
    def cat(parts: list[Agreement]) -> Agreement:
        """Join along positions."""
        names = [field.name for field in fields(Agreement)]
        return Agreement(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})


def agreement(said: TopK, live: TopK, live_logprobs: Tensor) -> Agreement:
    """Compare two TopK of the same positions.

    Without sampled ids the cosine is over the union of both sets of ids. With sampled ids, which
    leave out ids by chance, it is over the ids in `said`. If only sampled ids are stored, `top1`
    compares the most probable of these, and `overlap`, which is undefined then, is 1.

    Args:
        said: the cache's values, leading axis n.
        live: the teacher's values now, leading axis n, with K + M ids or more, the same
            temperatures and as many sampled ids.
        live_logprobs: float32 [n, K + M], the teacher's log-probabilities at `said_ids`.
    """
    known = _first_of_each(said)
    log_p = torch.cat((said.logprobs, said.sampled_logprobs), -1)
    p = torch.where(known, log_p.exp(), 0.0)
    at_known = torch.where(known, live_logprobs.exp(), 0.0)
    same_id, q_at_said = _found_in(said.ids, live.prefix(max(1, said.k)))
    if said.num_sampled:
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
    perfect = torch.ones_like(kl)
    if said.k:
        top1, overlap = said.ids[:, 0] == live.ids[:, 0], same_id.float().mean(-1)
    else:
        top1, overlap = p.argmax(-1) == at_known.argmax(-1), perfect
    off = log_p - live_logprobs
    bands = [off[:, first:end] for first, end in _bands(said)]
    lse, lse_tau = said.lse - live.lse, said.lse_tau - live.lse_tau
    entropy = said.entropy - live.entropy
    sums = (lse[:, None], lse_tau, entropy[:, None])
    return Agreement(
        cosine=dot / (p.norm(dim=-1) * other_norm),
        kl=kl,
        top1=top1.float(),
        overlap=overlap,
        logprobs=torch.stack([band.abs().mean(-1) for band in bands], -1).amax(-1),
        lse=lse.abs(),
        lse_tau=lse_tau.abs().amax(-1) if said.temperatures else torch.zeros_like(kl),
        entropy=entropy.abs(),
        sampled=sampled_overlap(said.sampled_ids, live.sampled_ids)
        if said.num_sampled
        else perfect,
        signed=torch.cat((*(band.mean(-1, keepdim=True) for band in bands), *sums), -1),
    )


def said_ids(topk: TopK) -> Tensor:
    """Return all ids with a stored probability, int64 [..., K + M]; sampled ids may repeat."""
    return torch.cat((topk.ids, topk.sampled_ids), -1)


def signed_names(topk: TopK) -> list[str]:
    """Return the names of the columns of `Agreement.signed`."""
    bands = [
        "sampled ids" if first == topk.k else f"k = {first + 1} to {end}"
        for first, end in _bands(topk)
    ]
    taus = [f"lse_tau at temperature {tau:g}" for tau in topk.temperatures]
    return [*(f"log-probabilities of {name}" for name in bands), "lse", *taus, "entropy"]


def _bands(topk: TopK) -> list[tuple[int, int]]:
    """Return the bands of `said_ids`: k = 1, 2, 3 to 4, 5 to 8 and so on, then the sampled ids.

    Each is (first, end), counted from 0.
    """
    edges = [0, *(2**i for i in range(topk.k.bit_length()) if 2**i < topk.k), topk.k]
    bands = [(a, b) for a, b in pairwise(edges) if a < b]
    return [*bands, (topk.k, topk.k + topk.num_sampled)] if topk.num_sampled else bands


def _found_in(ids: Tensor, live: TopK) -> tuple[Tensor, Tensor]:
    """Return bool [n, K], whether each of `ids` is in `live`, and its probability there, else 0."""
    by_id, order = live.ids.sort(-1)
    place = torch.searchsorted(by_id, ids).clamp_max(live.k - 1)
    found = by_id.gather(-1, place) == ids
    q = live.logprobs.exp().gather(-1, order.gather(-1, place))
    return found, torch.where(found, q, 0.0)


def _first_of_each(topk: TopK) -> Tensor:
    """Return bool [n, K + M], False where a sampled id repeats an earlier one."""
    by_id, order = topk.sampled_ids.sort(stable=True, dim=-1)
    repeats = torch.zeros_like(by_id, dtype=torch.bool)
    repeats[:, 1:] = by_id[:, 1:] == by_id[:, :-1]
    repeated = torch.empty_like(repeats).scatter_(-1, order, repeats)
    return torch.cat((torch.ones_like(topk.ids, dtype=torch.bool), ~repeated), -1)
