"""Any model folder for evaluation: states of a batch, and logits of some of its positions.

The logits of a whole batch (tokens x vocabulary in float32) are large, and positions outside the
loss do not need them, so the two steps are separate. For most models, states are final hidden
states, and logits are their product with the head, scaled or capped where the model does so. A
model with more in its head (Phi's bias, ModernBERT's norm) computes the logits itself.

Shapes: B batch, L length, n some positions of B x L, D hidden, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.vocabulary import require_shared_ids
from pipeline.errors import DecantError, MismatchError
from pipeline.model.attention_mask import document_positions
from pipeline.model.huggingface import (
    LogitsError,
    document_options,
    keeps_documents_apart,
    load_causal_lm,
    max_positions,
)
from pipeline.model.quantization import QuantizedError
from pipeline.model.student import Student
from pipeline.model.weights import open_student
from pipeline.runtime.device import compute_dtype, place_rounded
from pipeline.runtime.numerics import as_factor, matmul_float32
from pipeline.runtime.transfer import to_device


class JudgedModel(Protocol):
    """A causal language model evaluated in two steps."""

    parameters: int  # number of parameters; a tied matrix counts once
    vocab_size: int  # V
    max_seq_len: int | None  # longest row it can read; None if there is no limit

    def states(self, tokens: Tensor, doc_ids: Tensor | None) -> Tensor:
        """Map tokens, int64 [B, L] on the model's device, to states of positions [B * L, ...].

        Args:
            doc_ids: integers [B, L] on the CPU, the documents to keep apart; None for plain causal
                attention.

        Raises:
            DecantError: this architecture cannot keep documents apart.
        """
        ...

    def logits(self, states: Tensor) -> Tensor:
        """Map states of n positions to logits, float32 [n, V]."""
        ...


class ProductModel:
    """Hidden states times the head, with float32 weights under autocast, as in training."""

    def __init__(self, student: Student, dtype: torch.dtype) -> None:
        device = student.head_weight.device
        self._dtype = compute_dtype(dtype, device)
        if self._dtype != dtype:  # there is no autocast to round the weights
            student = place_rounded(student, dtype, device)
        self._student = student.eval()
        head = student.head_weight.detach()
        self._head = as_factor(head, self._dtype).T
        self.parameters = student.count_parameters()
        self.vocab_size = student.vocab_size
        self.max_seq_len = student.max_seq_len

    def states(self, tokens: Tensor, doc_ids: Tensor | None) -> Tensor:
        half = self._dtype != torch.float32
        with torch.autocast(tokens.device.type, dtype=self._dtype, enabled=half):
            return self._student.hidden_states(tokens, doc_ids).flatten(0, 1)

    def logits(self, states: Tensor) -> Tensor:
        states = as_factor(states, self._dtype)
        logits = matmul_float32(states, self._head, self._dtype, prepared=True)
        return self._student.logit_transform.apply_(logits)


class WholeModel:
    """A model of transformers that computes its logits itself, for a whole batch at once.

    Its states are those logits, B * L * V numbers in the weights' dtype.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        model = load_causal_lm(folder, dtype, what="model", device=device)
        self._model = place_rounded(model, dtype, device)
        self.parameters: int = self._model.num_parameters()
        self.vocab_size: int = len(self._model.get_output_embeddings().weight)
        self.max_seq_len: int | None = max_positions(self._model.config)
        self._keeps_apart = keeps_documents_apart(self._model, self.vocab_size)

    def states(self, tokens: Tensor, doc_ids: Tensor | None) -> Tensor:
        options: dict[str, Any] = {}
        if doc_ids is not None:
            if not self._keeps_apart:
                raise DecantError(
                    f"a {self._model.config.model_type!r} model always attends across "
                    "documents: set prepare.document_mask=false, or leave it out"
                )
            positions = to_device(document_positions(doc_ids), tokens.device)
            options = document_options(self._model, positions)
        logits: Tensor = self._model(input_ids=tokens, use_cache=False, **options).logits
        return logits.flatten(0, 1)

    def logits(self, states: Tensor) -> Tensor:
        return states.float()


def open_models(
    folders: Mapping[str, Path],
    corpus: CorpusSplit,
    tokenizer: Path,
    *,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> dict[str, JudgedModel]:
    """Open the models of Hugging Face folders by name, ours or of any architecture, for judging.

    Args:
        tokenizer: folder that holds the corpus's tokenizer, which is the teacher's.
        dtypes: dtype of each model's matrix products; in float32 nothing is rounded.

    Raises:
        MismatchError: a model's ids are not the corpus's (pipeline/data/vocabulary.py).
        DecantError: a folder is not a model, or its model cannot read the corpus's rows.
    """
    models = {}
    for name, folder in folders.items():
        require_shared_ids(folder, [corpus], tokenizer)
        model = _open(folder, dtypes[name], device)
        _require_room(folder, model, corpus)
        models[name] = model
    return models


def _open(folder: Path, dtype: torch.dtype, device: torch.device) -> JudgedModel:
    try:
        return ProductModel(open_student(folder).to(device), dtype)
    except (LogitsError, QuantizedError):
        return WholeModel(folder, dtype, device)


def _require_room(folder: Path, model: JudgedModel, corpus: CorpusSplit) -> None:
    """Refuse a model with fewer rows than ids, or a context shorter than the corpus's rows."""
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
