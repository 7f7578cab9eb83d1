"""Attention between the tokens of a packed row, determined by the row's document ids.

With a document mask, attention is block-diagonal and causal: each document attends only to itself,
with its positions counted from 0, as if it had the row to itself (Krell et al. 2021, "Efficient
Sequence Packing without Cross-contamination", section 3.2). Without one, attention is causal over
the whole row, so a document also attends to the unrelated documents packed before it.

Padding continues the document before it. No real token attends to padding, because padding comes
last, and no row of the mask is empty, so there is no NaN. The output for a document does not depend
on whether its batch needs a mask.

Shapes: B batch, L length.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def _starts(doc_ids: Tensor) -> Tensor:
    """Return bool [B, L], True at the first token of each document except the row's first."""
    starts = torch.zeros_like(doc_ids, dtype=torch.bool)
    starts[:, 1:] = (doc_ids[:, 1:] != doc_ids[:, :-1]) & (doc_ids[:, 1:] >= 0)
    return starts
