"""The positions at which a cache has targets: whether they are the right ones.

Without an entropy quantile they follow from the corpus: all positions in the loss. With one, their
number in each row does, and nothing else may depend on noise (`misplaced`). Which positions have
the highest entropies depends on the teacher: at those in the middle, noise may exchange one for
another, whose entropies differ by no more than the noise (`entropy_gap`).

Shapes: B rows, L length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.targets.selection import number_kept


def misplaced(has_target: Tensor, wanted: Tensor, quantile: float) -> Tensor:
    """Return how many targets each row has too many, too few or at the wrong place, int64 [B].

    Args:
        has_target: bool [B, L], of the cache.
        wanted: bool [B, L], the positions in the loss.
        quantile: of the entropy, above which positions in the loss have a target; 0: all have one.
    """
    outside = (has_target & ~wanted).sum(-1)
    inside = (has_target & wanted).sum(-1)
    return outside + (inside - number_kept(wanted.sum(-1), quantile)).abs()


def entropy_gap(entropy: Tensor, wanted: Tensor, quantile: float) -> Tensor:
    """Return by how many nats each entropy is below the least that is chosen in its row, [B, L].

    It is 0 at the positions with the highest entropies. Where a cache has a target, it may only
    differ from 0 by the noise of entropies.

    Args:
        entropy: float32 [B, L], of the live teacher; any values outside the loss.
        wanted, quantile: see `misplaced`.
    """
    descending = entropy.masked_fill(~wanted, -torch.inf).sort(-1, descending=True).values
    last = number_kept(wanted.sum(-1), quantile) - 1
    least = descending.gather(-1, last.clamp_min(0)[:, None])
    return (least - entropy).clamp_min(0.0)
