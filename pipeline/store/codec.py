"""Exact transforms between TopK tensors and the arrays of the cache (see store/schema.py).

The one lossy step of the whole cache is here and is chosen: log-probabilities are rounded to
float16. Rounding the log-probability costs 2e-7 nats of KL; rounding the raw logit would cost 6e-6
with a tail to 1e-4. float16 holds a log-probability of -16 to +-0.008.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.store.schema import Fingerprint
from pipeline.topk import TopK

Arrays = dict[str, NDArray[np.generic]]


def encode(topk: TopK) -> Arrays:
    """TopK of any leading shape -> arrays by name, in the dtypes of the format."""
    id_dtype = np.uint16 if topk.vocab_size <= 65_536 else np.uint32
    return {
        "ids": topk.ids.cpu().numpy().astype(id_dtype),
        "logprobs": to_steps(topk.logprobs.cpu().numpy().astype(np.float16)),
        "lse": topk.lse.cpu().numpy().astype(np.float32),
        "lse_tau": topk.lse_tau.cpu().numpy().astype(np.float32),
        "entropy": topk.entropy.cpu().numpy().astype(np.float16),
    }


def decode(arrays: Arrays, fingerprint: Fingerprint) -> TopK:
    """Arrays by name -> TopK on the CPU, in the dtypes that losses want."""
    return TopK(
        ids=torch.from_numpy(arrays["ids"].astype(np.int64)),
        logprobs=torch.from_numpy(from_steps(arrays["logprobs"]).astype(np.float32)),
        lse=torch.from_numpy(arrays["lse"].astype(np.float32)),
        lse_tau=torch.from_numpy(arrays["lse_tau"].astype(np.float32)),
        entropy=torch.from_numpy(arrays["entropy"].astype(np.float32)),
        temperatures=fingerprint.temperatures,
        vocab_size=fingerprint.vocab_size,
    )


def to_steps(values: NDArray[np.float16]) -> NDArray[np.uint16]:
    """float16 [..., K] -> differences of neighbouring bit patterns, modulo 2^16."""
    bits = values.view(np.uint16)
    steps = bits.copy()
    np.subtract(bits[..., 1:], bits[..., :-1], out=steps[..., 1:])
    return steps


def from_steps(steps: NDArray[np.generic]) -> NDArray[np.float16]:
    """The inverse of `to_steps`, bit for bit."""
    bits = np.cumsum(steps, axis=-1, dtype=np.uint16)
    return bits.view(np.float16)
