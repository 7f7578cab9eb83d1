"""A passage token by token: the expectations of teacher and models, and their divergence.

Text is cut where tokens end, so that the pieces joined give the passage. If several tokens spell
one character, it belongs to the last of them, and the others are empty. A choice that is only part
of a character, and therefore not text, is shown by its bytes, as <0xE4>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import PADDING
from pipeline.evaluation.metrics import kl_divergence
from pipeline.evaluation.models import JudgedModel
from pipeline.evaluation.results import TEACHER, Passage, PassageModel
from pipeline.generation.text_generator import PieceDecoder
from pipeline.teacher.teacher import Teacher

_CHOICES = 5
_DIGITS = 6
_ROWS_SEARCHED = 1024


@torch.no_grad()
def view_passage(
    teacher: Teacher,
    models: Mapping[str, JudgedModel],
    corpus: CorpusSplit,
    tokenizer: Any,
    length: int,
) -> Passage:
    """Show the beginning of a document to teacher and models; return what they expect next.

    Args:
        length: number of tokens, at least 2; fewer if no document has as many in one row.
    """
    passage = first_passage(corpus, length)
    tokens = torch.from_numpy(passage)[None].to(teacher.device)
    log_p = torch.cat([logits.log_softmax(-1) for _, logits in teacher.logits_by_chunk(tokens)])
    seen = {TEACHER: log_p[:-1]}
    for name, model in models.items():
        seen[name] = model.logits(model.states(tokens, None)[:-1]).log_softmax(-1)
    best = {name: log_q.topk(_CHOICES, dim=-1) for name, log_q in seen.items()}
    ids = torch.cat([top.indices for top in best.values()], dim=-1).tolist()
    texts, choices = read_tokens(tokenizer, passage.tolist(), [set(here) for here in ids])
    views = {}
    for name, log_q in seen.items():
        top = zip(
            choices, best[name].indices.tolist(), best[name].values.exp().tolist(), strict=True
        )
        views[name] = PassageModel(
            kl=_rounded(kl_divergence(log_p[:-1], log_q).tolist()),
            p_next=_rounded(log_q.gather(-1, tokens[0, 1:, None])[:, 0].exp().tolist()),
            top=[
                list(zip([names[number] for number in numbers], _rounded(ps), strict=True))
                for names, numbers, ps in top
            ],
        )
    return Passage(texts, views)


def first_passage(corpus: CorpusSplit, length: int) -> NDArray[np.int64]:
    """Return the first `length` tokens of the first document that starts in a row with enough room.

    If there is none among the first rows, return the longest available beginning of a document.
    """
    rows = corpus.rows(0, min(_ROWS_SEARCHED, len(corpus)))
    doc_ids = rows.doc_ids.ravel()
    numbers, starts, counts = np.unique(doc_ids, return_index=True, return_counts=True)
    row_length = corpus.info.row_length
    sizes = np.minimum(counts, row_length - starts % row_length)  # rows do not see each other
    sizes[numbers == PADDING] = 0
    size, start = max(zip(np.minimum(sizes, length), -starts, strict=True))
    return rows.tokens.ravel()[-start : -start + size]


def read_tokens(
    tokenizer: Any, passage: Sequence[int], choices: Sequence[AbstractSet[int]]
) -> tuple[list[str], list[dict[int, str]]]:
    """Return readable text for a passage's tokens, and for the tokens that might have followed.

    Args:
        tokenizer: Hugging Face's.
        passage: token ids.
        choices: ids that might follow each token except the last.

    Returns:
        The text that each token adds; and for each of `choices`, texts by id.
    """
    decoder = PieceDecoder(tokenizer, control_tokens=True)
    texts, named = [], []
    for token, wanted in zip(passage, [*choices, set[int]()], strict=True):
        texts.append(decoder.push(token))
        named.append({choice: _choice_text(decoder, tokenizer, choice) for choice in wanted})
    texts[-1] += decoder.flush()
    return texts, named[:-1]


def _choice_text(decoder: PieceDecoder, tokenizer: Any, token: int) -> str:
    if token >= len(tokenizer):  # a row of the model's head beyond the vocabulary
        return f"<id {token}>"
    text = decoder.peek(token).lstrip("\ufffd")  # missing bytes of the passage's own character
    if text and not text.endswith("\ufffd"):
        return text
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    name = str(tokenizer.convert_ids_to_tokens(token))
    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    if not name.isascii() and set(name) <= bytes_of.keys():
        return "".join(f"<0x{bytes_of[letter]:02X}>" for letter in name)
    return name


def _rounded(values: list[float]) -> list[float]:
    return [round(value, _DIGITS) for value in values]
