"""TopK: what is kept of a teacher's distribution, the type that passes between all stages.

`prepare` makes it from logits, the store keeps it, the losses consume it, and the online teacher
makes the very same thing, so that cached and online training differ in nothing but the source.

Shapes: ... any leading axes, K kept ids, J stored temperatures, V valid vocabulary (the ids a
tokenizer can produce; rows of the head beyond it are padding and are left out of every sum).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import MismatchError, ParamsError

_BLOCK = 64  # logits a block of `block_top_k`
_ROWS_AT_ONCE_ON_CPU = 16  # so that the rows being reduced stay in the processor's cache
_TENSORS = ("ids", "logprobs", "lse", "lse_tau", "entropy")


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The K most probable ids of each position with the exact normalisers of the full row."""

    ids: Tensor  # int64 [..., K], by falling logit
    logprobs: Tensor  # float32 [..., K], logit - lse, nats at temperature 1
    lse: Tensor  # float32 [...], logsumexp of the full row's logits
    lse_tau: Tensor  # float32 [..., J], log sum_v exp(logprob_v / tau_j)
    entropy: Tensor  # float32 [...], nats, of the full row at temperature 1
    temperatures: tuple[float, ...]  # the J temperatures of lse_tau
    vocab_size: int  # V

    @property
    def k(self) -> int:
        """K, the number of kept ids."""
        return self.ids.shape[-1]

    def map(self, function: Callable[[Tensor], Tensor]) -> TopK:
        """Apply a tensor function to every tensor field (move, index, reshape leading axes)."""
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in _TENSORS}
        return replace(self, **changed)

    def __getitem__(self, index: Any) -> TopK:
        """Index the leading axes of every tensor."""
        return self.map(lambda tensor: tensor[index])

    @staticmethod
    def stack(parts: Sequence[TopK]) -> TopK:
        """Parts of equal shape [...] -> one TopK [len(parts), ...]."""
        return _joined(parts, torch.stack)

    @staticmethod
    def cat(parts: Sequence[TopK]) -> TopK:
        """Parts joined along their first axis."""
        return _joined(parts, torch.cat)

    def prefix(self, k: int) -> TopK:
        """The first k of the K kept ids; the normalisers stay those of the full row."""
        if not 1 <= k <= self.k:
            raise ParamsError(f"k={k} is outside 1..{self.k}, the number of ids stored")
        return replace(self, ids=self.ids[..., :k], logprobs=self.logprobs[..., :k])

    def target(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities on the kept ids and the mass outside them, at a temperature.

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
            if temperature not in self.temperatures:
                stored = ", ".join(f"{tau:g}" for tau in self.temperatures)
                raise MismatchError(
                    f"temperature={temperature:g} is not among the stored temperatures ({stored}):"
                    " choose one of them, or add it to prepare.temperatures and capture again"
                )
            column = self.temperatures.index(temperature)
            log_p = self.logprobs / temperature - self.lse_tau[..., column, None]
        if self.k >= self.vocab_size:
            return log_p, torch.zeros_like(self.lse)
        return log_p, (1.0 - log_p.exp().sum(-1)).clamp(0.0, 1.0)


def _joined(parts: Sequence[TopK], join: Callable[[list[Tensor]], Tensor]) -> TopK:
    tensors: dict[str, Any] = {
        name: join([getattr(part, name) for part in parts]) for name in _TENSORS
    }
    return replace(parts[0], **tensors)


@torch.no_grad()
def top_k_from_logits(logits: Tensor, k: int, temperatures: tuple[float, ...]) -> TopK:
    """Reduce full rows of logits to TopK; the single place where that happens.

    Args:
        logits: float32 [n, V], valid ids only. OVERWRITTEN: it is the work space.
        k: ids to keep, 1..V.
        temperatures: the temperatures whose normalisers are kept.

    The row's maximum is subtracted first, in float32, so that no exponential overflows:
    rounding a raw logit later would cost 30 times more than rounding a log-probability.
    """
    vocab_size = logits.shape[-1]
    if k > vocab_size:
        raise ParamsError(f"k={k} exceeds the {vocab_size} ids of the vocabulary: lower prepare.k")
    at_once = _ROWS_AT_ONCE_ON_CPU if logits.device.type == "cpu" else len(logits)
    work = torch.empty(min(len(logits), at_once), vocab_size, device=logits.device)
    return TopK.cat(
        [_reduce(rows, work[: len(rows)], k, temperatures) for rows in torch.split(logits, at_once)]
    )


def _reduce(logits: Tensor, work: Tensor, k: int, temperatures: tuple[float, ...]) -> TopK:
    """One block of `top_k_from_logits`; overwrites logits and work, both [n, V]."""
    values, ids = block_top_k(logits, k)
    peak = values[:, :1]
    shifted = logits.sub_(peak)
    total = torch.exp(shifted, out=work).sum(-1)
    log_total = total.log()
    entropy = log_total - work.mul_(shifted).sum(-1) / total
    lse_tau = torch.empty(len(logits), len(temperatures), device=logits.device)
    for column, tau in enumerate(temperatures):
        if tau == 1.0:  # log sum_v exp(logprob_v) = 0 by definition
            lse_tau[:, column] = 0.0
            continue
        torch.mul(shifted, 1.0 / tau, out=work)
        # sum_v exp(logprob_v / tau), with logprob_v = shifted_v - log_total
        lse_tau[:, column] = work.exp_().sum(-1).log() - log_total / tau
    return TopK(
        ids=ids,
        logprobs=values - peak - log_total[:, None],
        lse=peak[:, 0] + log_total,
        lse_tau=lse_tau,
        entropy=entropy.clamp_min(0.0),
        temperatures=temperatures,
        vocab_size=logits.shape[-1],
    )


def block_top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk in two stages: the k blocks with the largest maxima hold the k largest values.

    Same values as `torch.topk(values, k)` in about half the time on a large last axis; among
    equal values the ids may differ. The plain twin is torch.topk itself.
    """
    size = values.shape[-1]
    blocks = size // _BLOCK
    if blocks <= k:
        top = values.topk(k, dim=-1)
        return top.values, top.indices
    body = values[:, : blocks * _BLOCK].view(-1, blocks, _BLOCK)
    best_blocks = body.amax(-1).topk(k, dim=-1).indices
    offsets = torch.arange(_BLOCK, device=values.device)
    candidate_ids = (best_blocks[..., None] * _BLOCK + offsets).flatten(1)
    if size % _BLOCK:
        rest = torch.arange(blocks * _BLOCK, size, device=values.device)
        candidate_ids = torch.cat((candidate_ids, rest.expand(len(values), -1)), dim=-1)
    candidates = values.gather(-1, candidate_ids)
    top = candidates.topk(k, dim=-1)
    return top.values, candidate_ids.gather(-1, top.indices)
