"""Exact transforms between TopK tensors and the arrays of the cache (see store/schema.py).

The only lossy step of the whole cache is here, and it is deliberate: log-probabilities are rounded
to float16. Rounding the log-probability costs 2e-7 nats of KL; rounding the raw logit would cost
6e-6, and up to 1e-4 at some positions. float16 holds a log-probability of -16 to within +-0.008.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.logit_cache.format import Fingerprint
from pipeline.targets.topk import TopK

Arrays = dict[str, NDArray[Any]]


class RankTable:
    """The permutation between token ids and ranks.

    Args:
        rank_to_id: [V], the id at each rank.
    """

    def __init__(self, rank_to_id: NDArray[Any]) -> None:
        self.rank_to_id = rank_to_id.astype(np.int64)  # the type that losses index with
        dtype = np.uint16 if len(rank_to_id) <= 65_536 else np.uint32
        self.id_to_rank = np.empty(len(rank_to_id), dtype)
        self.id_to_rank[self.rank_to_id] = np.arange(len(rank_to_id), dtype=dtype)

    def to_bytes(self) -> bytes:
        """Return rank_to_id as little-endian uint32; the table is named by the crc32c of this."""
        return self.rank_to_id.astype("<u4").tobytes()

    @staticmethod
    def counted(ids: NDArray[Any], vocab_size: int) -> RankTable:
        """Rank ids by how often they appear, most frequent first; ties by the smaller id."""
        counts = np.bincount(ids.ravel(), minlength=vocab_size)
        return RankTable(np.argsort(-counts, kind="stable"))


def encode(topk: TopK, table: RankTable) -> Arrays:
    """Convert a TopK of any leading shape to arrays by name, in the dtypes of the format."""
    arrays = {
        "id_ranks": table.id_to_rank[topk.ids.cpu().numpy()],
        "logprob_steps": to_steps(topk.logprobs.cpu().numpy().astype(np.float16).view(np.uint16)),
        "lse": topk.lse.cpu().numpy().astype(np.float32),
        "lse_tau": topk.lse_tau.cpu().numpy().astype(np.float32),
        "entropy": topk.entropy.cpu().numpy().astype(np.float16),
    }
    if topk.draws:
        ranks = table.id_to_rank[topk.draw_ids.cpu().numpy()]
        order = np.argsort(ranks, axis=-1, kind="stable")
        logprobs = topk.draw_logprobs.cpu().numpy().astype(np.float16)
        arrays["draw_rank_steps"] = to_steps(np.take_along_axis(ranks, order, -1))
        arrays["draw_logprobs"] = np.take_along_axis(logprobs, order, -1)
    return {name: values for name, values in arrays.items() if values.shape[-1]}


def restore(name: str, chunks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Join the chunks of one stored array to [rows, ...] in the same type, and undo the steps.

    Args:
        chunks: as returned by `pipeline.io.zarr_shards.decode_shard`.

    Returns:
        Ranks for "id_ranks" and "draw_rank_steps", float16 for "logprob_steps", otherwise the
        values as stored.
    """
    if name == "logprob_steps":  # rank by rank, as stored: one vector addition for each
        return np.concatenate(
            [np.moveaxis(from_steps(chunk, axis=0).view(np.float16), 0, -1) for chunk in chunks]
        )
    values = np.concatenate(chunks)
    return from_steps(values) if name == "draw_rank_steps" else values


def to_topk(arrays: Arrays, table: RankTable, fingerprint: Fingerprint) -> TopK:
    """Convert arrays from `restore`, by name, to a TopK on the CPU, in the dtypes of the losses."""
    leading = arrays["lse"].shape

    def tensor(name: str) -> torch.Tensor:
        values = arrays.get(name)
        return torch.zeros(*leading, 0) if values is None else torch.from_numpy(values).float()

    def ids(name: str) -> torch.Tensor:
        ranks = arrays.get(name)
        if ranks is None:
            return torch.zeros(*leading, 0, dtype=torch.int64)
        return torch.from_numpy(np.take(table.rank_to_id, ranks))

    return TopK(
        ids=ids("id_ranks"),
        logprobs=tensor("logprob_steps"),
        lse=tensor("lse"),
        lse_tau=tensor("lse_tau"),
        entropy=tensor("entropy"),
        draw_ids=ids("draw_rank_steps"),
        draw_logprobs=tensor("draw_logprobs"),
        temperatures=fingerprint.temperatures,
        vocab_size=fingerprint.vocab_size,
    )


def to_steps(values: NDArray[Any]) -> NDArray[Any]:
    """Replace unsigned integers [..., K] by the first, then differences of neighbours, modulo 2^n.

    n is the number of bits of the type.
    """
    steps = values.copy()
    np.subtract(values[..., 1:], values[..., :-1], out=steps[..., 1:])
    return steps


def from_steps(steps: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    """Invert `to_steps` bit for bit, along any axis."""
    if axis != 0:
        return np.cumsum(steps, axis=axis, dtype=steps.dtype)
    values = steps.copy()
    for k in range(1, len(values)):  # NumPy's cumsum along the first axis is six times slower
        values[k] += values[k - 1]
    return values
