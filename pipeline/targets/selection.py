"""What is kept of a teacher's distributions: ids up to a mass, distinct samples, some positions.

Shapes: n positions, K kept ids, M sampled ids, B rows, L length.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.targets.topk import TopK


def cut_to_mass(ids: Tensor, logprobs: Tensor, top_p: float | None) -> tuple[Tensor, Tensor]:
    """Keep the fewest of the K ids that hold the mass `top_p`, or all K if they hold less.

    This is the nucleus of Holtzman et al. 2020 ("The Curious Case of Neural Text Degeneration",
    section 3.1), without renormalising it. A slot that is cut repeats the first id, with a
    log-probability of -inf.

    Args:
        ids: int64 [n, K], by descending log-probability.
        logprobs: float32 [n, K].
        top_p: in (0, 1]; None keeps all.
    """
    if top_p is None or not ids.shape[-1]:
        return ids, logprobs
    p = logprobs.exp()
    is_cut = p.cumsum(-1) - p >= top_p
    is_cut[:, 0] = False
    return torch.where(is_cut, ids[:, :1], ids), logprobs.masked_fill(is_cut, -torch.inf)


def count_distinct(sampled: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's distinct ids in ascending order, and how often each occurs; both [n, M].

    Args:
        sampled: int64 [n, M]. Where fewer than M ids are distinct, the remaining slots repeat the
            first id and have the count 0.
    """
    by_id = sampled.sort(-1).values
    is_new = torch.ones_like(by_id, dtype=torch.bool)
    is_new[:, 1:] = by_id[:, 1:] != by_id[:, :-1]
    slot = is_new.cumsum(-1) - 1
    counts = torch.zeros_like(by_id, dtype=torch.int32)
    counts.scatter_add_(-1, slot, torch.ones_like(counts))
    ids = by_id[:, :1].expand_as(by_id).scatter(-1, slot, by_id)
    return ids, counts


def number_kept(num_positions: Tensor, quantile: float) -> Tensor:
    """Return how many of each row's positions in the loss have a target, int64 [B].

    Args:
        num_positions: integer [B], the number of positions in the loss.
        quantile: see `keep_highest_entropy`.
    """
    # Rounded first, since 0.8 is a little more than 4/5 in float64
    return num_positions - torch.floor((num_positions.double() * quantile).round(decimals=6)).long()


def keep_highest_entropy(topk: TopK, quantile: float) -> TopK:
    """Leave a target only to the positions whose entropy is above a quantile of their row.

    Positions at which the teacher is certain teach a student little more than the label does; the
    share with the highest entropy is chosen row by row ("SE-KD", arXiv 2602.01395), so that it
    depends on nothing but the row.

    Args:
        topk: [B, L, ...].
        quantile: in [0, 1), of the entropy over the row's positions with a target; 0 keeps all.
    """
    if not quantile:
        return topk
    entropy = topk.entropy.masked_fill(~topk.has_target, -torch.inf)
    place = entropy.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    wanted = number_kept(topk.has_target.sum(-1), quantile)
    return replace(topk, has_target=topk.has_target & (place < wanted[:, None]))
