"""Export to the columns from which axolotl's KD plugin trains.

Written for axolotl at commit 067b021 (2026-07-24), src/axolotl/integrations/kd. Its collator and
trainer take

    input_ids, attention_mask, labels   as its pre-tokenized datasets have them
    target_token_ids, target_logprobs   one list per position: ids, and their log-probabilities
    target_mask                         1 for each of these that counts

and a dataset that has the first three columns is not prepared any further. There is one example per
document, since axolotl packs by itself (`sample_packing`); where the teacher attended across the
documents of a row, there is one per row.

Alignment. axolotl's loss compares the student's output at position t with target t, without a
shift, and only shifts the labels, so target t is the distribution of token t + 1, as in the cache.
Before version 0.11 it shifted the targets as well, and its `chat_template` type still aligns them
for that; a dataset with these columns does not pass through that type.

axolotl knows no tail: its targets are probabilities that add up to 1 over the kept ids, at
`kd_temperature`. Here they are made so, which needs no normaliser, at any temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.packing import IGNORE, PADDING, Rows, document_places, unshifted_labels
from pipeline.interchange.dataset_folder import Table, lists, lists_of_lists
from pipeline.logit_cache.format import Fingerprint
from pipeline.targets.topk import TopK


def axolotl_table(*, document_mask: bool, temperature: float) -> Callable[[Rows, TopK], Table]:
    """Return the function that makes the columns from rows and their targets [n, L, ...].

    Args:
        document_mask: whether the teacher kept the documents of a row apart.
        temperature: of the targets, axolotl's `kd_temperature`.
    """

    def table(rows: Rows, topk: TopK) -> Table:
        labels = unshifted_labels(rows).numpy()
        examples = [
            (row, place)
            for row, doc_ids in enumerate(rows.doc_ids)
            for place in _examples(doc_ids, document_mask=document_mask)
            if (labels[row, place] != IGNORE).any()
        ]
        lengths = np.array([place.stop - place.start for _, place in examples], np.int64)
        length = rows.tokens.shape[1]
        numbers = [np.arange(row * length + p.start, row * length + p.stop) for row, p in examples]
        positions = np.concatenate([np.zeros(0, np.int64), *numbers])
        targets = topk.map(lambda t: t.flatten(0, 1)[torch.from_numpy(positions)])
        is_kept = targets.is_kept & targets.has_target[:, None]
        logprobs = torch.log_softmax(targets.logprobs / temperature, -1)
        return {
            "input_ids": lists(rows.tokens.ravel()[positions].astype(np.int32), lengths),
            "attention_mask": lists(np.ones(len(positions), np.int8), lengths),
            "labels": lists(labels.ravel()[positions].astype(np.int32), lengths),
            "target_token_ids": lists_of_lists(targets.ids.int(), is_kept, lengths),
            "target_logprobs": lists_of_lists(logprobs, is_kept, lengths),
            "target_mask": lists_of_lists(torch.ones_like(targets.ids).char(), is_kept, lengths),
        }

    return table


def lost_to_axolotl(fingerprint: Fingerprint) -> Iterator[str]:
    """Yield what the columns cannot say."""
    yield "the mass outside the kept ids (the targets add up to 1 without it)"
    if fingerprint.imported_from is None:
        yield "lse, entropy and normalisers"
    if fingerprint.num_sampled:
        yield f"{fingerprint.num_sampled} sampled ids per position"


def _examples(doc_ids: NDArray[Any], *, document_mask: bool) -> list[slice]:
    """Return the places of the examples of a row: its documents, or all of it but padding."""
    if document_mask:
        return [place for _, place in document_places(doc_ids)]
    return [slice(0, int((doc_ids != PADDING).sum()))]
