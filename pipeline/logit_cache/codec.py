"""Transforms between TopK tensors and the arrays of the cache (see format.py).

What is lossy in the whole cache is here, and deliberate: log-probabilities and lse are rounded to
float16, entropies to steps of 1/4096 nat. Rounding the log-probability costs 2e-7 nats of KL;
rounding the raw logit would cost 6e-6, and up to 1e-4 at some positions. float16 holds a
log-probability of -16 to within +-0.008, against which the +-0.00012 of an entropy, and hence of a
normaliser, are small. No target depends on lse, which only shifts all logits of a position.

Values with several entries per position are ragged: positions may hold fewer than K ids or D
distinct sampled ids, or none. Measured with the demo's teacher, in bytes per token: ids and counts
of 50 samples (14.5 distinct ids) take 22.8 position by position, 22.4 rank by rank, 28.3 padded to
50 entries, and 24.5 as all 50 ids in order; the first is decoded fastest, twice as fast as the
second. The cut of top_p=0.95 to 35 of 64 ids takes 79.6 ragged and 90.4 padded. Only the
differences of log-probabilities are stored rank by rank, for which they take 44.9 instead of 48.4
at K = 64. Storing the SET of the 64 ids, as gaps in ascending order, takes 58.6 for them instead of
94.7, but then log-probabilities in the order of the ids take 88.5: the order is information, of
which either array has to hold the 38 bytes.

Shapes: n positions, K kept ids, D distinct sampled ids, J temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.io.checked_json import DamagedError
from pipeline.logit_cache.format import ENTROPY_STEPS, Fingerprint
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
        wanted = topk[topk.has_target]
        ids = wanted.ids[wanted.is_kept], wanted.sampled_ids[wanted.sampled_counts > 0]
        return IdOrder.by_frequency(torch.cat(ids).cpu().numpy(), topk.vocab_size)


def encode(topk: TopK, id_order: IdOrder, fingerprint: Fingerprint, chunk_rows: int) -> Arrays:
    """Convert TopK [rows, L, ...] to arrays by name, in the dtypes of the format.

    Returns:
        [rows, L, ...] for the arrays with a value per position; [chunks, up to S] for the ragged
        ones.
    """
    if not topk.has_row_sums:  # NaN, which integers cannot express; the fingerprint says so
        nothing = torch.zeros_like(topk.lse)
        topk = replace(topk, lse=nothing, entropy=nothing)
    has_target = topk.has_target.cpu().numpy()
    entropies = _in_steps(topk).cpu().numpy().astype(np.uint16)
    arrays = {
        "lse": np.where(has_target, _to_half(_in_range(topk.lse)), np.float16(0.0)),
        "entropies": np.where(has_target[..., None], entropies, np.uint16(0)),
    }
    if fingerprint.k:
        num = np.where(has_target, topk.is_kept.sum(-1).cpu().numpy(), 0)
        arrays["num_kept"] = num.astype(count_dtype(fingerprint.k))
        indices = id_order.index_of[topk.ids.cpu().numpy()]
        deltas = to_deltas(_to_half(topk.logprobs).view(np.uint16))
        arrays["id_indices"] = _ravel(indices, num, chunk_rows, fingerprint.k)
        arrays["logprob_deltas"] = _ravel(deltas, num, chunk_rows, fingerprint.k, by_rank=True)
    if fingerprint.num_sampled:
        counts = topk.sampled_counts.cpu().numpy()
        indices = id_order.index_of[topk.sampled_ids.cpu().numpy()]
        ends = np.where(counts > 0, indices.astype(np.int64), len(id_order.ids))
        order = np.argsort(ends, axis=-1, kind="stable")  # ascending, empty slots last
        num, most = np.where(has_target, (counts > 0).sum(-1), 0), fingerprint.num_sampled
        dtype = count_dtype(most)
        deltas = to_deltas(np.take_along_axis(indices, order, -1))
        arrays["num_distinct"] = num.astype(dtype)
        arrays["sampled_index_deltas"] = _ravel(deltas, num, chunk_rows, most)
        counts = np.take_along_axis(counts, order, -1).astype(dtype)
        arrays["sampled_counts"] = _ravel(counts, num, chunk_rows, most)
        if fingerprint.temperatures:
            logprobs = np.take_along_axis(_to_half(topk.sampled_logprobs), order, -1)
            arrays["sampled_logprobs"] = _ravel(logprobs, num, chunk_rows, most)
    return arrays


def decode(chunks: Mapping[str, Sequence[NDArray[Any]]], fingerprint: Fingerprint) -> Arrays:
    """Undo `encode`, except for the types of the numbers, which stay narrow.

    Args:
        chunks: for each array its chunks, as returned by `pipeline.io.zarr_shards.decode_shard`.

    Returns:
        Arrays [rows, L, ...] by name: "lse", "entropies", "ids" and "sampled_ids" (indices into the
        id order), "logprobs" and "sampled_logprobs" (float16), and "sampled_counts". Empty slots
        are as in TopK.

    Raises:
        DamagedError: a position holds more ids than the cache keeps.
    """
    arrays = {name: _joined(chunks[name]) for name in ("lse", "entropies")}
    if fingerprint.k:
        slots = [_Slots(num, fingerprint.k) for num in _checked(chunks["num_kept"], fingerprint.k)]
        ids = zip(slots, chunks["id_indices"], strict=True)
        deltas = zip(slots, chunks["logprob_deltas"], strict=True)
        arrays["ids"] = _joined([slot.ids(flat[0]) for slot, flat in ids])
        arrays["logprobs"] = _joined([slot.logprobs(flat[0]) for slot, flat in deltas])
    if fingerprint.num_sampled:
        counts = _checked(chunks["num_distinct"], fingerprint.num_sampled)
        longest = max(int(num.max(initial=0)) for num in counts)
        slots = [_Slots(num, longest) for num in counts]
        for name, stored in _SAMPLED.items():
            if stored in chunks:
                undo = _Slots.running_sums if name == "sampled_ids" else _Slots.values
                flats = zip(slots, chunks[stored], strict=True)
                arrays[name] = _joined([undo(slot, flat[0]) for slot, flat in flats])
    return arrays


def to_topk(arrays: Arrays, id_order: IdOrder, fingerprint: Fingerprint) -> TopK:
    """Convert arrays from `decode`, by name, to a TopK on the CPU, in the dtypes of the losses."""
    leading = arrays["lse"].shape

    def tensor(name: str, dtype: torch.dtype) -> Tensor:
        values = arrays.get(name)
        if values is None:
            return torch.zeros(*leading, 0, dtype=dtype)
        if not values.flags.writeable:  # bytes of a chunk, of which torch warns
            values = values.copy()
        return torch.from_numpy(values).to(dtype)

    def ids(name: str) -> Tensor:
        indices = arrays.get(name)
        if indices is None:
            return torch.zeros(*leading, 0, dtype=torch.int64)
        return torch.from_numpy(np.take(id_order.ids, indices))

    logprobs = tensor("logprobs", torch.float32)
    counts = tensor("sampled_counts", torch.int32)
    has_target = counts.new_zeros(leading, dtype=torch.bool)
    for first in (logprobs[..., :1] > -torch.inf, counts[..., :1] > 0):
        has_target |= first.any(-1)
    entropies = tensor("entropies", torch.float32).div_(ENTROPY_STEPS)
    lse, entropy = tensor("lse", torch.float32), entropies[..., 0]
    if fingerprint.imported_from:
        lse, entropy = lse.fill_(torch.nan), entropy.fill_(torch.nan)
    return TopK(
        has_target=has_target,
        ids=ids("ids"),
        logprobs=logprobs,
        lse=lse,
        lse_tau=entropies[..., 1:] * _exponents(fingerprint.temperatures),
        entropy=entropy,
        sampled_ids=ids("sampled_ids"),
        sampled_counts=counts,
        sampled_logprobs=tensor("sampled_logprobs", torch.float32),
        num_sampled=fingerprint.num_sampled,
        temperatures=fingerprint.temperatures,
        vocab_size=fingerprint.vocab_size,
        has_row_sums=fingerprint.imported_from is None,
    )


def as_stored(topk: TopK) -> TopK:
    """Round a TopK of any leading shape as a cache does."""
    entropies = _in_steps(topk) / ENTROPY_STEPS
    return replace(
        topk,
        logprobs=topk.logprobs.half().float(),
        lse=_in_range(topk.lse).half().float(),
        sampled_logprobs=topk.sampled_logprobs.half().float(),
        entropy=entropies[..., 0],
        lse_tau=entropies[..., 1:] * _exponents(topk.temperatures).to(entropies.device),
    )


def _in_steps(topk: TopK) -> Tensor:
    """Return the entropy, then the Renyi entropies of the temperatures, in steps: [..., 1 + J]."""
    renyi = topk.lse_tau / _exponents(topk.temperatures).to(topk.lse_tau.device)
    entropies = torch.cat((topk.entropy[..., None], renyi), -1)
    return (entropies * ENTROPY_STEPS).round().clamp(0, 65_535)


def _exponents(temperatures: tuple[float, ...]) -> Tensor:
    """Return 1 - 1 / tau, by which a Renyi entropy gives the normaliser: float32 [J]."""
    return torch.tensor([1.0 - 1.0 / tau for tau in temperatures])


def count_dtype(most: int) -> str:
    """Return the narrowest unsigned type for counts up to `most`."""
    return str(np.min_scalar_type(most))


def _to_half(values: Tensor) -> NDArray[Any]:
    half: NDArray[Any] = values.cpu().half().numpy()
    return half


def _in_range(lse: Tensor) -> Tensor:
    """Limit lse to the range of float16, which no language model's logits leave."""
    limits = torch.finfo(torch.float16)
    return lse.clamp(limits.min, limits.max)


_SAMPLED = {
    "sampled_ids": "sampled_index_deltas",
    "sampled_counts": "sampled_counts",
    "sampled_logprobs": "sampled_logprobs",
}


def _ravel(
    values: NDArray[Any], num: NDArray[Any], chunk_rows: int, most: int, *, by_rank: bool = False
) -> NDArray[Any]:
    """Concatenate the first `num` of each position's values, chunk by chunk.

    Args:
        values: [rows, L, D], with D up to `most`, which is K or M.
        num: [rows, L].
        by_rank: take the first values of all positions, then the second ones, and so on.

    Returns:
        [chunks, chunk_rows * L * most], filled up with zeros.
    """
    rows, length, width = values.shape
    chunks = -(-rows // chunk_rows)
    out = np.zeros((chunks, chunk_rows * length * most), values.dtype)
    for chunk in range(chunks):
        part = slice(chunk * chunk_rows, (chunk + 1) * chunk_rows)
        of_chunk, is_filled = values[part].reshape(-1, width), _is_filled(num[part], width)
        if by_rank:
            of_chunk, is_filled = _transposed(of_chunk), is_filled.T
        flat = of_chunk[is_filled]
        out[chunk, : len(flat)] = flat
    return out


def _is_filled(num: NDArray[Any], width: int) -> NDArray[Any]:
    """Return which of `width` slots each position fills, the first num of them: bool [n, width]."""
    is_filled: NDArray[Any] = np.arange(width) < num.reshape(-1, 1)
    return is_filled


def _transposed(values: NDArray[Any]) -> NDArray[Any]:
    """Transpose a matrix of integers; NumPy takes twice as long as PyTorch."""
    signed = values.view(f"i{values.itemsize}")
    copied = torch.from_numpy(np.ascontiguousarray(signed)).t().contiguous().numpy()
    transposed: NDArray[Any] = copied.view(values.dtype)
    return transposed


class _Slots:
    """The slots of a chunk's positions, of which each position fills the first num.

    Positions without a target are left aside while the others are decoded.

    Args:
        num: [rows, L].
        width: number of slots per position.
    """

    def __init__(self, num: NDArray[Any], width: int) -> None:
        self._shape = (*num.shape, width)
        self._has_any = num.ravel() > 0
        counts = num.ravel()[self._has_any]
        self._num_any = len(counts)
        self._size = int(counts.sum(dtype=np.int64))
        self._is_filled = None  # bool [positions with any, width]; None: all are
        if self._size < len(counts) * width:
            self._is_filled = _is_filled(counts, width)

    def values(self, flat: NDArray[Any]) -> NDArray[Any]:
        """Return values [rows, L, width] stored position by position; 0 in empty slots."""
        return self._spread(self._unravelled(flat), 0)

    def running_sums(self, flat: NDArray[Any]) -> NDArray[Any]:
        """Return `values` of deltas; what is in empty slots has no meaning."""
        return self._spread(from_deltas(self._unravelled(flat)), 0)

    def ids(self, flat: NDArray[Any]) -> NDArray[Any]:
        """Return indices [rows, L, width]; empty slots repeat the first one."""
        values = self._unravelled(flat)
        if self._is_filled is not None:
            np.copyto(values, values[:, :1], where=~self._is_filled)
        return self._spread(values, 0)

    def logprobs(self, flat: NDArray[Any]) -> NDArray[Any]:
        """Return log-probabilities [rows, L, width], whose deltas are stored rank by rank."""
        width = self._shape[-1]
        if self._is_filled is None:
            by_rank = flat[: self._size].reshape(width, self._num_any)
        else:
            is_filled = _transposed(self._is_filled.view(np.uint8)).view(np.bool_)
            by_rank = np.zeros(is_filled.shape, flat.dtype)
            by_rank[is_filled] = flat[: self._size]
        values = _transposed(from_deltas(by_rank, axis=0)).view(np.float16)
        if self._is_filled is not None:
            values[~self._is_filled] = -np.inf
        return self._spread(values, -np.inf)

    def _unravelled(self, flat: NDArray[Any]) -> NDArray[Any]:
        if self._is_filled is None:
            return flat[: self._size].reshape(self._num_any, self._shape[-1])
        values = np.zeros(self._is_filled.shape, flat.dtype)
        values[self._is_filled] = flat[: self._size]
        return values

    def _spread(self, values: NDArray[Any], nothing: float) -> NDArray[Any]:
        """Put the values of positions with any into [rows, L, width]."""
        if len(values) == len(self._has_any):
            return values.reshape(self._shape)
        out = np.empty((len(self._has_any), values.shape[-1]), values.dtype)
        out[self._has_any] = values
        out[~self._has_any] = nothing
        return out.reshape(self._shape)


def _joined(chunks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Concatenate chunks; one alone is not copied."""
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _checked(counts: Sequence[NDArray[Any]], most: int) -> Sequence[NDArray[Any]]:
    """Return the counts of ids per position, none of which may exceed what a position can hold."""
    largest = max(int(num.max(initial=0)) for num in counts)
    if largest > most:
        raise DamagedError(f"a position says that it holds {largest} of at most {most} ids")
    return counts


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
