"""Reduce full rows of logits to TopK, with exact normalisers, entropy and sampled ids.

This happens in one place only, so that capture, the live teacher, the gate and every benchmark keep
the same numbers.

Shapes: n positions, K kept ids, M sampled ids, J stored temperatures, V valid vocabulary (the ids a
tokenizer can produce; rows of the head beyond it are padding and are left out of every sum).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ParamsError
from pipeline.runtime.triton_usable import triton_usable
from pipeline.targets import reduce_torch
from pipeline.targets.topk import TopK


class Reduction(Protocol):
    """The interface of both modules, `reduce_torch` and `reduce_triton`."""

    def reduce_rows(
        self,
        logits: Tensor,
        k: int,
        temperatures: tuple[float, ...],
        uniforms: Tensor | None,
        top_p: float | None = None,
    ) -> TopK: ...


@torch.no_grad()
def top_k_from_logits(
    logits: Tensor,
    k: int,
    temperatures: tuple[float, ...],
    uniforms: Tensor | None = None,
    top_p: float | None = None,
) -> TopK:
    """Reduce full rows of logits to TopK.

    Args:
        logits: float32 [n, V], valid ids only.
        k: ids to keep, 0..V.
        temperatures: the temperatures other than 1 whose normalisers are kept. Without any, the
            log-probabilities of sampled ids are left out, since nothing needs them at 1.
        uniforms: float [n, M] in [0, 1), which decide the M sampled ids; None samples nothing.
        top_p: keep the fewest of the k ids that hold this mass; None keeps all k.
    """
    temperatures = tuple(tau for tau in temperatures if tau != 1.0)
    vocab_size = logits.shape[-1]
    if k > vocab_size:
        raise ParamsError(
            f"k={k} exceeds the {vocab_size} ids of the vocabulary: lower prepare.k, or train.k if "
            "it is set"
        )
    return reduction_for(logits.device).reduce_rows(logits, k, temperatures, uniforms, top_p)


def reduction_for(device: torch.device) -> Reduction:
    """Return the reduction: Triton's kernels on a GPU where they run, else PyTorch's passes."""
    if triton_usable(device):
        from pipeline.targets import reduce_triton  # it imports triton

        return reduce_triton
    return reduce_torch


def row_uniforms(rows: Iterable[int], length: int, num_sampled: int, seed: int) -> Tensor:
    """Return the uniforms that decide the sampled ids: float32 [B, L, M] in [0, 1).

    They depend on (seed, row) alone, so a shard holds the same sampled ids whichever process
    captures it, and an online teacher samples the same ids.
    """
    return torch.from_numpy(
        np.stack(
            [
                np.random.default_rng([seed, row]).random((length, num_sampled), dtype=np.float32)
                for row in rows
            ]
        )
    )
