"""TopK: the part of a teacher's distribution that is kept, and the type all stages exchange.

`prepare` makes it from logits, the cache keeps it and the losses consume it. A live teacher
makes exactly the same type, so cached and online training differ only in the source.

Shapes: ... any leading axes, K kept ids, M sampled ids, J stored temperatures, V valid vocabulary
(the ids a tokenizer can produce; rows of the head beyond it are padding and are left out of every
sum).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import MismatchError, ParamsError

_TENSORS = ("ids", "logprobs", "lse", "lse_tau", "entropy", "sampled_ids", "sampled_logprobs")


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The K most probable ids at each position, with the exact normalisers of the full row."""

    ids: Tensor  # int64 [..., K], in descending order of logit
    logprobs: Tensor  # float32 [..., K], logit - lse, nats at temperature 1
    lse: Tensor  # float32 [...], logsumexp of the full row's logits
    lse_tau: Tensor  # float32 [..., J], log sum_v exp(logprob_v / tau_j)
    entropy: Tensor  # float32 [...], nats, of the full row at temperature 1
    # Sampled with replacement from p outside `ids`, at temperature 1.
    sampled_ids: Tensor  # int64 [..., M]
    sampled_logprobs: Tensor  # float32 [..., M], for the sampled ids, at temperature 1
    temperatures: tuple[float, ...]  # the J temperatures of lse_tau
    vocab_size: int  # V

    @property
    def k(self) -> int:
        """K, the number of kept ids."""
        return self.ids.shape[-1]

    @property
    def num_sampled(self) -> int:
        """M, the number of sampled ids."""
        return self.sampled_ids.shape[-1]

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
        """Join parts along their first axis."""
        return _joined(parts, torch.cat)

    def prefix(self, k: int) -> TopK:
        """Return the first k of the K kept ids; the normalisers still cover the full row."""
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
        if self.k >= self.vocab_size:
            return log_p, torch.zeros_like(self.lse)
        return log_p, (1.0 - log_p.exp().sum(-1)).clamp(0.0, 1.0)

    def sampled_target(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the sampled ids, and the mass that each represents.

        A sampled id v represents the mass w_v = p_t / M times p_tau(v) / p(v), where p_t is the
        mass outside the kept ids and p is the teacher at temperature 1, from which v was sampled.
        This is importance sampling: E[sum of w_v over sampled ids of v] = p_tau(v) for every v
        outside the kept ids, at any temperature. At temperature 1 every weight is p_t / M.

        Returns:
            log_p float32 [..., M] at the temperature, weight float32 [..., M].

        Raises:
            MismatchError: the normaliser of this temperature was not stored.
        """
        _, tail_mass = self.target(1.0)
        share = (tail_mass / max(1, self.num_sampled))[..., None].expand_as(self.sampled_logprobs)
        if temperature == 1.0:
            return self.sampled_logprobs, share
        log_p = self.sampled_logprobs / temperature - self._normaliser(temperature)
        return log_p, share * (log_p - self.sampled_logprobs).exp()

    def _normaliser(self, temperature: float) -> Tensor:
        """Return log sum_v exp(logprob_v / tau), [..., 1]."""
        if temperature not in self.temperatures:
            stored = ", ".join(f"{tau:g}" for tau in self.temperatures)
            raise MismatchError(
                f"temperature={temperature:g} is not among the stored temperatures ({stored}):"
                " choose one of them, or add it to prepare.temperatures and capture again"
            )
        return self.lse_tau[..., self.temperatures.index(temperature), None]


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
    merged: Tensor = torch.special.entr(p).sum(-1) + torch.special.entr(tail_mass)  # -x log x
    return (topk.entropy.double() - merged).clamp_min(0.0)


def _joined(parts: Sequence[TopK], join: Callable[[list[Tensor]], Tensor]) -> TopK:
    tensors: dict[str, Any] = {
        name: join([getattr(part, name) for part in parts]) for name in _TENSORS
    }
    return replace(parts[0], **tensors)
