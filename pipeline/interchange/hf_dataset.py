"""Export to a plain Hugging Face dataset: the rows of the corpus, and what the cache says of them.

    input_ids, doc_ids      the row's L tokens, and the document of each (-1: padding)
    labels                  token t, or -100 where it is not a target; models shift them themselves
    teacher_ids             one list per position: the kept ids, the most probable one first
    teacher_logprobs        their log-probabilities at temperature 1; those at t are of token t + 1
    entropy, lse            of the full row of logits, one number per position; 0 without a target
    lse_tau                 one list per position: log sum exp(logprob / tau) over all ids, for
                            each of the temperatures
    sampled_ids             one list per position: the distinct sampled ids
    sampled_counts          and how often each was sampled

Columns that would be empty are left out. At a position without a target all lists are
empty, apart from lse_tau.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pipeline.data.packing import Rows, unshifted_labels
from pipeline.interchange.dataset_folder import Table, lists, lists_of_lists
from pipeline.logit_cache.format import Fingerprint
from pipeline.targets.topk import TopK


def plain_table(rows: Rows, topk: TopK) -> Table:
    """Return the columns of rows and their targets [n, L, ...]."""
    lengths = np.full(len(rows), rows.tokens.shape[1])
    flat = topk.map(lambda t: t.flatten(0, 1))
    has_target = flat.has_target[:, None]
    table = {
        "input_ids": lists(rows.tokens.ravel().astype(np.int32), lengths),
        "labels": lists(unshifted_labels(rows).int().numpy().ravel(), lengths),
        "doc_ids": lists(rows.doc_ids.ravel(), lengths),
    }
    if topk.k:
        is_kept = flat.is_kept & has_target
        table["teacher_ids"] = lists_of_lists(flat.ids.int(), is_kept, lengths)
        table["teacher_logprobs"] = lists_of_lists(flat.logprobs, is_kept, lengths)
    if topk.has_row_sums:
        for name in ("entropy", "lse"):
            table[name] = lists(getattr(flat, name).numpy(), lengths)
    if topk.temperatures:
        everywhere = torch.ones_like(flat.lse_tau, dtype=torch.bool)
        table["lse_tau"] = lists_of_lists(flat.lse_tau, everywhere, lengths)
    if topk.num_sampled:
        is_sampled = (flat.sampled_counts > 0) & has_target
        table["sampled_ids"] = lists_of_lists(flat.sampled_ids.int(), is_sampled, lengths)
        table["sampled_counts"] = lists_of_lists(flat.sampled_counts, is_sampled, lengths)
    return table


def lost_to_datasets(fingerprint: Fingerprint) -> Iterator[str]:
    """Yield what the columns cannot say."""
    if fingerprint.num_sampled and fingerprint.temperatures:
        yield "log-probabilities of the sampled ids"
    yield "checksums, and the check that tokens and targets belong together"
