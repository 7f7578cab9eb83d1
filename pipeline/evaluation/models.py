"""Any model folder as evaluation sees it: states of a batch, and logits of some of them.

Logits of a whole batch (tokens x vocabulary in float32) are large, and positions out of the loss
need none, so the two steps are apart. For most models states are final hidden states, and logits
their product with the head. A model that does more to its logits (Phi's bias, Gemma 2's cap,
Cohere's scale) is asked for the logits themselves.

Shapes: B batch, L length, n some positions of B x L, D hidden, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline.data.rows import CorpusSplit
from pipeline.data.vocabulary import require_shared_ids
from pipeline.errors import DecantError, MismatchError
from pipeline.model.attention import document_positions
from pipeline.model.base import Student
from pipeline.model.hugging_face import (
    LogitsError,
    keeps_documents_apart,
    load_causal_lm,
    max_positions,
)
from pipeline.model.weights import open_student
from pipeline.runtime.device import compute_dtype, place_rounded
from pipeline.runtime.numerics import mm_float32


class JudgedModel(Protocol):
    """A causal language model in two steps."""

    parameters: int  # a tied matrix counted once
    vocab_size: int  # V
    max_seq_len: int | None  # longest row it takes; None where there is no limit

    def states(self, tokens: Tensor, doc_ids: Tensor | None) -> Tensor:
        """Tokens int64 [B, L], on the model's device -> a state of each position [B * L, ...].

        Args:
            doc_ids: integers [B, L], of documents to be kept apart; None for plain causal
                attention.

        Raises:
            DecantError: this architecture cannot keep documents apart.
        """
        ...

    def logits(self, states: Tensor) -> Tensor:
        """States of n positions -> float32 [n, V]."""
        ...


class ProductModel:
    """Hidden states times the head, in float32 weights under autocast, as students are trained."""

    def __init__(self, student: Student, dtype: torch.dtype) -> None:
        device = student.head_weight.device
        self._dtype = compute_dtype(dtype, device)
        if self._dtype != dtype:  # no autocast to round the weights
            student = place_rounded(student, dtype, device)
        self._student = student.eval()
        head = student.head_weight.detach()
        self._head = head.float() if head.device.type == "cpu" else head  # see mm_float32
        self.parameters = student.count_parameters()
        self.vocab_size = student.vocab_size
        self.max_seq_len = student.max_seq_len

    def states(self, tokens: Tensor, doc_ids: Tensor | None) -> Tensor:
        half = self._dtype != torch.float32
        with torch.autocast(tokens.device.type, dtype=self._dtype, enabled=half):
            return self._student.hidden_states(tokens, doc_ids).flatten(0, 1)

    def logits(self, states: Tensor) -> Tensor:
        return mm_float32(states, self._head.T, self._dtype)


class WholeModel:
    """A model of transformers that computes its logits itself, all of a batch at once.

    Its states are those logits, B * L * V numbers in the weights' format.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._model = place_rounded(load_causal_lm(folder, dtype, what="model"), dtype, device)
        self.parameters: int = self._model.num_parameters()
        self.vocab_size: int = len(self._model.get_output_embeddings().weight)
        self.max_seq_len: int | None = max_positions(self._model.config)
        self._keeps_apart = keeps_documents_apart(self._model, self.vocab_size)

    def states(self, tokens: Tensor, doc_ids: Tensor | None) -> Tensor:
        options = {}
        if doc_ids is not None:
            if not self._keeps_apart:
                raise DecantError(
                    f"a {self._model.config.model_type!r} model attends across documents whatever "
                    "it is told: set prepare.attention=packed, or leave it out"
                )
            options["position_ids"] = document_positions(doc_ids)
        logits: Tensor = self._model(input_ids=tokens, use_cache=False, **options).logits
        return logits.flatten(0, 1)

    def logits(self, states: Tensor) -> Tensor:
        return states.float()


def open_models(
    folders: Mapping[str, Path],
    corpus: CorpusSplit,
    tokenizer: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, JudgedModel]:
    """The models of Hugging Face folders by name, ours or of any architecture, ready to be judged.

    Args:
        tokenizer: folder that holds the corpus's tokenizer: the teacher's.
        dtype: of matrix products; float32 ones are not rounded.

    Raises:
        MismatchError: a model's ids are not the corpus's (pipeline/data/vocabulary.py).
        DecantError: a folder is no model, or its model cannot take the corpus's rows.
    """
    models = {}
    for name, folder in folders.items():
        require_shared_ids(folder, [corpus], tokenizer)
        model = _open(folder, dtype, device)
        _require_room(folder, model, corpus)
        models[name] = model
    return models


def _open(folder: Path, dtype: torch.dtype, device: torch.device) -> JudgedModel:
    try:
        return ProductModel(open_student(folder).to(device), dtype)
    except LogitsError:
        return WholeModel(folder, dtype, device)


def _require_room(folder: Path, model: JudgedModel, corpus: CorpusSplit) -> None:
    """Refuse fewer rows than ids, and a context shorter than the corpus's rows."""
    if model.vocab_size < corpus.info.vocab_size:
        raise MismatchError(
            f"{folder} has {model.vocab_size:,} vocabulary rows for the corpus's "
            f"{corpus.info.vocab_size:,} ids, so it cannot read all of it: choose another model"
        )
    if model.max_seq_len is not None and model.max_seq_len < corpus.info.row_length:
        raise MismatchError(
            f"{folder} reads up to {model.max_seq_len:,} tokens, fewer than the corpus's rows of "
            f"{corpus.info.row_length:,}: choose another model, or make the corpus again with a "
            "shorter corpus.row_length"
        )
