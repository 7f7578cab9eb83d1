"""Attention between the tokens of a packed row, determined by the row's document ids.

With a document mask, attention is block-diagonal and causal: each document attends only to itself,
with its positions counted from 0, as if it had the row to itself (Krell et al. 2021, "Efficient
Sequence Packing without Cross-contamination", section 3.2). Without one, attention is causal over
the whole row, so a document also attends to the unrelated documents packed before it.

Padding continues the document before it. No real token attends to padding, because padding comes
last, and no row of the mask is empty, so there is no NaN. The output for a document does not depend
on whether its batch needs a mask.

A mask is L x L numbers per row, all of which attention computes. On GPUs whose FlashAttention takes
sequences of different lengths, models get `Segments` instead, and nothing between documents is
computed.

Shapes: B batch, L length, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.transfer import to_device


@dataclass(frozen=True)
class Segments:
    """The documents of a batch as consecutive parts of its B * L tokens."""

    bounds: Tensor  # int32 [N + 1], the first token of each document, and B * L
    longest: int  # no document has more tokens
    kernel: Callable[..., Any]  # what `flash_within` returns

    @classmethod
    def of(cls, doc_ids: Tensor, device: torch.device, kernel: Callable[..., Any]) -> Segments:
        """Find the documents of integer doc_ids [B, L], on the CPU; `bounds` is on the device."""
        starts = _starts(doc_ids)
        starts[:, 0] = True
        end = torch.tensor([doc_ids.numel()])
        bounds = torch.cat((starts.flatten().nonzero()[:, 0], end)).int()
        return cls(to_device(bounds, device), doc_ids.shape[1], kernel)


def documents_apart(doc_ids: Tensor, document_mask: bool) -> Tensor | None:
    """Return the document ids that models must keep apart, or None if causal attention suffices.

    Plain causal attention suffices without a document mask, and if each row holds one document,
    with or without padding; then no mask is made and the fastest kernels apply. Call this on the
    CPU: on a GPU, reading the ids would force a synchronisation.

    Args:
        doc_ids: integer [B, L], negative for padding.
        document_mask: whether documents are to be kept apart, see the module.
    """
    if not document_mask or not bool(_starts(doc_ids).any()):
        return None
    return doc_ids


def document_positions(doc_ids: Tensor) -> Tensor:
    """Return each token's distance from the start of its document: int64 [B, L], from 0."""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device)
    return index - torch.where(_starts(doc_ids), index, 0).cummax(1).values


def document_mask(doc_ids: Tensor) -> Tensor:
    """Return bool [B, 1, L, L], True where the query (third axis) may attend to the key (fourth).

    This is the form that `scaled_dot_product_attention` takes. It needs B x L x L bytes, so it is
    made once per batch, for all layers.
    """
    number = _starts(doc_ids).cumsum(1)
    return (number[:, :, None] == number[:, None, :]).tril()[:, None]


def attention_within(
    doc_ids: Tensor, device: torch.device, dtype: torch.dtype, head_size: int, dropout: float
) -> Tensor | Segments:
    """Return what keeps documents apart in the form that is fastest on a device.

    Args:
        doc_ids: integer [B, L], on the CPU.
        dtype, head_size: of queries, keys and values.
        dropout: of attention weights, which FlashAttention's form for segments does not have.
    """
    kernel = None if dropout else flash_within(device, dtype, head_size)
    if kernel is None:
        return document_mask(to_device(doc_ids, device))
    return Segments.of(doc_ids, device, kernel)


def has_flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a GPU has FlashAttention: in half formats, from compute capability 8.0 on."""
    half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def flash_within(
    device: torch.device, dtype: torch.dtype, head_size: int
) -> Callable[..., Any] | None:
    """Return PyTorch's causal attention within segments, or None if the device has none.

    It takes queries [T, H, E], keys and values [T, G, E], their bounds twice, and the length of the
    longest segment twice. It exists where FlashAttention does, for heads whose size is a multiple
    of 8 up to 256, in this form since PyTorch 2.11.
    """
    if head_size % 8 or head_size > 256 or not has_flash_attention(device, dtype):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        return None
    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    return partial(varlen_attn, **options)


def attend_within(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Attend within segments: q [B, H, L, E], k and v [B, G, L, E] -> [B, H, L, E]."""
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    bounds, longest = segments.bounds, segments.longest
    mixed: Tensor = segments.kernel(*flat, bounds, bounds, longest, longest)
    return mixed.view(q.shape[0], q.shape[2], *mixed.shape[1:]).transpose(1, 2)


def _starts(doc_ids: Tensor) -> Tensor:
    """Return bool [B, L], True at the first token of each document except the row's first."""
    starts = torch.zeros_like(doc_ids, dtype=torch.bool)
    starts[:, 1:] = (doc_ids[:, 1:] != doc_ids[:, :-1]) & (doc_ids[:, 1:] >= 0)
    return starts
