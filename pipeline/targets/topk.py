"""TopK: the part of a teacher's distribution that is kept, and the type all stages exchange.

`prepare` makes it from logits, the cache keeps it and the losses consume it. A live teacher
makes exactly the same type, so cached and online training differ only in the source.

Positions may keep fewer than K ids (prepare.top_p), have fewer than D distinct sampled ids, or have
no target at all. The tensors are filled up for them: a slot without a kept id repeats the first id,
with a log-probability of -inf, and a slot without a sampled id has the count 0.

Shapes: ... any leading axes, K kept ids, D distinct sampled ids, J stored temperatures, V valid
vocabulary (the ids a tokenizer can produce; rows of the head beyond it are padding and are left out
of every sum).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import MismatchError, ParamsError

_TENSORS = (
    "has_target",
    "ids",
    "logprobs",
    "lse",
    "lse_tau",
    "entropy",
    "sampled_ids",
    "sampled_counts",
    "sampled_logprobs",
)


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The K most probable ids at each position, with the exact normalisers of the full row."""

    has_target: Tensor  # bool [...], False where all other values have no meaning
    ids: Tensor  # int64 [..., K], in descending order of logit
    logprobs: Tensor  # float32 [..., K], logit - lse, nats at temperature 1; -inf where no id is
    lse: Tensor  # float32 [...], logsumexp of the full row's logits; NaN without row sums
    lse_tau: Tensor  # float32 [..., J], log sum_v exp(logprob_v / tau_j)
    entropy: Tensor  # float32 [...], nats, of the full row at temperature 1; NaN without row sums
    # Sampled with replacement from p outside `ids`, at temperature 1; each distinct id once.
    sampled_ids: Tensor  # int64 [..., D]
    sampled_counts: Tensor  # int32 [..., D], how often each id was sampled; 0 where no id is
    sampled_logprobs: Tensor  # float32 [..., D] at temperature 1; [..., 0] if they are not kept
    num_sampled: int  # M, the number of ids sampled at each position, repeated ones included
    temperatures: tuple[float, ...]  # the J temperatures of lse_tau; 1 needs none
    vocab_size: int  # V
    has_row_sums: bool = True  # False: of an imported cache, which knows neither lse nor entropy

    @property
    def k(self) -> int:
        """K, the number of kept ids."""
        return self.ids.shape[-1]

    @property
    def is_kept(self) -> Tensor:
        """Whether each slot of `ids` holds an id, bool [..., K]."""
        return self.logprobs > -torch.inf

    @property
    def is_repeat(self) -> Tensor:
        """Whether each slot of `ids` only repeats the first slot's id, bool [..., K].

        This differs from `~is_kept` where no slot holds an id, as without a target.
        """
        is_repeat = ~self.is_kept
        is_repeat[..., :1] = False
        return is_repeat

    def map(self, function: Callable[[Tensor], Tensor]) -> TopK:
        """Apply a tensor function to every tensor field (move, index, reshape leading axes)."""
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in _TENSORS}
        return replace(self, **changed)

    def __getitem__(self, index: Any) -> TopK:
        """Index the leading axes of every tensor."""
        return self.map(lambda tensor: tensor[index])

    @staticmethod
    def stack(parts: Sequence[TopK]) -> TopK:
        """Stack parts of equal shape [...] into one TopK [len(parts), ...]."""
        return _joined(parts, torch.stack)

    @staticmethod
    def cat(parts: Sequence[TopK]) -> TopK:
        """Join parts along their first axis; their D may differ, as a cache's shards do."""
        most = max(part.sampled_ids.shape[-1] for part in parts)
        return _joined([_with_slots(part, most) for part in parts], torch.cat)

    def spread(self, index: Tensor, shape: Sequence[int]) -> TopK:
        """Return TopK [*shape, ...] with these positions [n, ...] at `index`, no target elsewhere.

        Args:
            index: int64 [n], counted over the flattened shape, on any device.
        """

        def filled(name: str, tensor: Tensor) -> Tensor:
            nothing = -torch.inf if name == "logprobs" else 0
            out = tensor.new_full((prod(shape), *tensor.shape[1:]), nothing)
            return out.index_copy_(0, index, tensor).view(*shape, *tensor.shape[1:])

        changed: dict[str, Any] = {name: filled(name, getattr(self, name)) for name in _TENSORS}
        return replace(self, **changed)

    def prefix(self, k: int) -> TopK:
        """Return at most the first k of the kept ids; the normalisers still cover the full row."""
        if not 1 <= k <= self.k:
            raise ParamsError(f"k={k} is outside 1..{self.k}, the number of ids stored")
        return replace(self, ids=self.ids[..., :k], logprobs=self.logprobs[..., :k])

    def target(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the kept ids and the mass outside them, at a temperature.

        log p_tau(v) = logprob_v / tau - log sum_u exp(logprob_u / tau), with the exact stored
        normaliser: nothing is renormalised.

        Returns:
            log_p float32 [..., K] and tail_mass float32 [...], in [0, 1].

        Raises:
            MismatchError: the normaliser of this temperature was not stored.
        """
        if temperature == 1.0:  # log sum_v exp(logprob_v) = 0 by definition
            log_p = self.logprobs
        else:
            log_p = self.logprobs / temperature - self._normaliser(temperature)
        tail_mass = (1.0 - log_p.exp().sum(-1)).clamp(0.0, 1.0)
        if self.k >= self.vocab_size:  # nothing but rounding is left where all ids are kept
            tail_mass = tail_mass.masked_fill(self.is_kept.all(-1), 0.0)
        return log_p, tail_mass

    def sampled_target(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the mass that each sampled id represents, and their sum of mass times log p.

        An id v that was sampled c_v times in M represents the mass w_v = p_t c_v / M times
        p_tau(v) / p(v), where p_t is the mass outside the kept ids and p is the teacher at
        temperature 1, from which v was sampled. This is importance sampling: E[w_v] = p_tau(v) for
        every v outside the kept ids, at any temperature. At temperature 1 every weight is
        p_t c_v / M, and the sum has no noise, since the entropy of the full row is known:
        sum p log p outside T = -H(p) - sum_T p log p.

        Returns:
            weight float32 [..., D], and an estimate of sum p_tau log p_tau over the ids outside the
            kept ones, float32 [...].

        Raises:
            MismatchError: this temperature's normaliser or the sampled ids' log-probabilities were
                not stored.
        """
        _, tail_mass = self.target(1.0)
        weight = (tail_mass / max(1, self.num_sampled))[..., None] * self.sampled_counts
        if temperature == 1.0:
            p = self.logprobs.exp()
            return weight, -sum_p_log_p(p) - self.entropy
        log_p = self.sampled_logprobs / temperature - self._normaliser(temperature)
        weight = weight * (log_p - self.sampled_logprobs).exp()
        return weight, (weight * log_p).sum(-1)

    def _normaliser(self, temperature: float) -> Tensor:
        """Return log sum_v exp(logprob_v / tau), [..., 1]."""
        if temperature not in self.temperatures:
            stored = ", ".join(f"{tau:g}" for tau in (1.0, *self.temperatures))
            raise MismatchError(
                f"temperature={temperature:g} is not among the stored temperatures ({stored}):"
                " choose one of them, or add it to prepare.temperatures and capture again"
            )
        return self.lse_tau[..., self.temperatures.index(temperature), None]


def sum_p_log_p(p: Tensor) -> Tensor:
    """Return the sum of p log p over the last axis, where 0 log 0 is 0.

    A GPU has a kernel for xlogy; torch.special.entr is compiled there when it is first used.
    """
    return torch.xlogy(p, p).sum(-1)


def nats_lost(topk: TopK) -> Tensor:
    """Return the teacher's entropy inside the bucket of ids outside the K: float64 [...], nats.

    By the chain rule of entropy (Cover & Thomas 2006, theorem 2.2.1) the entropy of p is the
    entropy of p with the tail merged into one bucket, plus the entropy that remains once the bucket
    is known:

        H(p) = -sum_T p log p - p_t log p_t + p_t H(p | tail)

    with T the kept ids and p_t the mass outside them, at temperature 1. The last term is returned,

        p_t H(p | tail) = H(p) + sum_T p log p + p_t log p_t

    where H(p) is the exact entropy of the full row, which TopK holds, so no id outside T is needed.
    """
    p = topk.logprobs.double().exp()
    tail_mass = (1.0 - p.sum(-1)).clamp(0.0, 1.0)
    merged = -sum_p_log_p(p) - torch.xlogy(tail_mass, tail_mass)
    return (topk.entropy.double() - merged).clamp_min(0.0)


def _with_slots(topk: TopK, number: int) -> TopK:
    """Add empty slots for sampled ids, up to `number`."""
    missing = number - topk.sampled_ids.shape[-1]
    if not missing:
        return topk
    names = ["sampled_ids", "sampled_counts", *(["sampled_logprobs"] if topk.temperatures else [])]
    padded: dict[str, Any] = {name: F.pad(getattr(topk, name), (0, missing)) for name in names}
    return replace(topk, **padded)


def _joined(parts: Sequence[TopK], join: Callable[[list[Tensor]], Tensor]) -> TopK:
    tensors: dict[str, Any] = {
        name: join([getattr(part, name) for part in parts]) for name in _TENSORS
    }
    return replace(parts[0], **tensors)
