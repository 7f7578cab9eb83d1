"""Exact transforms between TopK tensors and the arrays of the cache (see format.py).

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


class IdOrder:
    """The ids in order of frequency, so that frequent ids have small indices.

    Args:
        ids: [V], a permutation of 0..V-1: the id at each index.
    """

    def __init__(self, ids: NDArray[Any]) -> None:
        self.ids = ids.astype(np.int64)  # the type that losses index with
        dtype = np.uint16 if len(ids) <= 65_536 else np.uint32
        self.index_of = np.empty(len(ids), dtype)  # [V], the index of each id
        self.index_of[self.ids] = np.arange(len(ids), dtype=dtype)

    def to_bytes(self) -> bytes:
        """Return the ids as little-endian uint32; the array is named by the crc32c of this."""
        return self.ids.astype("<u4").tobytes()

    @staticmethod
    def by_frequency(ids: NDArray[Any], vocab_size: int) -> IdOrder:
        """Order all V ids by how often they appear in `ids`; ties by the smaller id."""
        counts = np.bincount(ids.ravel(), minlength=vocab_size)
        return IdOrder(np.argsort(-counts, kind="stable"))

    @staticmethod
    def of(topk: TopK) -> IdOrder:
        """Order ids by how often they are kept or sampled in a TopK of any leading shape."""
        ids = [ids.cpu().numpy().ravel() for ids in (topk.ids, topk.sampled_ids)]
        return IdOrder.by_frequency(np.concatenate(ids), topk.vocab_size)


def encode(topk: TopK, id_order: IdOrder) -> Arrays:
    """Convert a TopK of any leading shape to arrays by name, in the dtypes of the format."""
    arrays = {
        "id_indices": id_order.index_of[topk.ids.cpu().numpy()],
        "logprob_deltas": to_deltas(topk.logprobs.cpu().numpy().astype(np.float16).view(np.uint16)),
        "lse": topk.lse.cpu().numpy().astype(np.float32),
        "lse_tau": topk.lse_tau.cpu().numpy().astype(np.float32),
        "entropy": topk.entropy.cpu().numpy().astype(np.float16),
    }
    if topk.num_sampled:
        indices = id_order.index_of[topk.sampled_ids.cpu().numpy()]
        order = np.argsort(indices, axis=-1, kind="stable")
        logprobs = topk.sampled_logprobs.cpu().numpy().astype(np.float16)
        arrays["sampled_index_deltas"] = to_deltas(np.take_along_axis(indices, order, -1))
        arrays["sampled_logprobs"] = np.take_along_axis(logprobs, order, -1)
    return {name: values for name, values in arrays.items() if values.shape[-1]}


def restore(name: str, chunks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Join the chunks of one stored array to [rows, ...] in the same type, and undo the deltas.

    Args:
        chunks: as returned by `pipeline.io.zarr_shards.decode_shard`.

    Returns:
        Indices for "id_indices" and "sampled_index_deltas", float16 for "logprob_deltas", otherwise
        the values as stored.
    """
    if name == "logprob_deltas":  # k by k, as stored: one vector addition for each
        return np.concatenate(
            [np.moveaxis(from_deltas(chunk, axis=0).view(np.float16), 0, -1) for chunk in chunks]
        )
    values = np.concatenate(chunks)
    return from_deltas(values) if name == "sampled_index_deltas" else values


def to_topk(arrays: Arrays, id_order: IdOrder, fingerprint: Fingerprint) -> TopK:
    """Convert arrays from `restore`, by name, to a TopK on the CPU, in the dtypes of the losses."""
    leading = arrays["lse"].shape

    def tensor(name: str) -> torch.Tensor:
        values = arrays.get(name)
        return torch.zeros(*leading, 0) if values is None else torch.from_numpy(values).float()

    def ids(name: str) -> torch.Tensor:
        indices = arrays.get(name)
        if indices is None:
            return torch.zeros(*leading, 0, dtype=torch.int64)
        return torch.from_numpy(np.take(id_order.ids, indices))

    return TopK(
        ids=ids("id_indices"),
        logprobs=tensor("logprob_deltas"),
        lse=tensor("lse"),
        lse_tau=tensor("lse_tau"),
        entropy=tensor("entropy"),
        sampled_ids=ids("sampled_index_deltas"),
        sampled_logprobs=tensor("sampled_logprobs"),
        temperatures=fingerprint.temperatures,
        vocab_size=fingerprint.vocab_size,
    )


def to_deltas(values: NDArray[Any]) -> NDArray[Any]:
    """Replace unsigned integers [..., K] by the first, then differences of neighbours, modulo 2^n.

    n is the number of bits of the type.
    """
    deltas = values.copy()
    np.subtract(values[..., 1:], values[..., :-1], out=deltas[..., 1:])
    return deltas


def from_deltas(deltas: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    """Invert `to_deltas` bit for bit, along any axis."""
    if axis != 0:
        return np.cumsum(deltas, axis=axis, dtype=deltas.dtype)
    values = deltas.copy()
    for k in range(1, len(values)):  # NumPy's cumsum along the first axis is six times slower
        values[k] += values[k - 1]
    return values
