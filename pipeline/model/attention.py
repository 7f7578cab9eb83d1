"""Which tokens of a packed row see each other, from the row's document ids.

    documents   block-diagonal causal attention: each document attends to itself alone, its
                positions counted from 0, as if it had the row to itself (Krell et al. 2021,
                "Efficient Sequence Packing without Cross-contamination", section 3.2)
    packed      plain causal attention over the whole row: a document also attends to those packed
                before it, which have nothing to do with it

Padding continues the document before it. Nothing real attends to padding, which comes last, and no
row of the mask is empty, so there is no NaN; and what a document comes out as is the same whether
its batch needs a mask or not.

Shapes: B batch, L length.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Attention = Literal["documents", "packed"]


def documents_apart(doc_ids: Tensor, attention: str) -> Tensor | None:
    """The document ids that models are to keep apart; None where plain causal attention does.

    That is so under `packed`, and where each row holds one document, with or without padding: then
    no mask is made and the fastest kernels apply. Call it on the CPU: on a GPU, looking at the ids
    would wait for it.

    Args:
        doc_ids: integer [B, L], negative for padding. attention: see the module.
    """
    if attention == "packed" or not bool(_starts(doc_ids).any()):
        return None
    return doc_ids


def document_positions(doc_ids: Tensor) -> Tensor:
    """How far each token is from its document's first in the row: int64 [B, L], from 0."""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device)
    return index - torch.where(_starts(doc_ids), index, 0).cummax(1).values


def document_mask(doc_ids: Tensor) -> Tensor:
    """Bool [B, 1, L, L], True where the query (third axis) may attend to the key (fourth).

    As `scaled_dot_product_attention` takes it. B x L x L bytes: made once a batch, for all layers.
    """
    number = _starts(doc_ids).cumsum(1)
    return (number[:, :, None] == number[:, None, :]).tril()[:, None]


def _starts(doc_ids: Tensor) -> Tensor:
    """Bool [B, L], True at the first token of each document but the row's first."""
    starts = torch.zeros_like(doc_ids, dtype=torch.bool)
    starts[:, 1:] = (doc_ids[:, 1:] != doc_ids[:, :-1]) & (doc_ids[:, 1:] >= 0)
    return starts
