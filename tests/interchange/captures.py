"""A tiny teacher's outputs over some documents, as DistillKit's capture writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.params import Params
from pipeline.model.tokenizer import load_tokenizer
from tests.helpers import change
from tests.interchange.distillkit_writer import COMPRESSION, columns_of, write_capture
from tests.models import make_sentences

K = 16
LONGEST = 96


@dataclass(frozen=True)
class Sequence:
    """A document, and the kept ids of all its positions but the last."""

    tokens: list[int]
    ids: np.ndarray  # [n - 1, K]
    logprobs: np.ndarray  # float64 [n - 1, K], at temperature 1


def sequences_of(teacher: Path, count: int = 24) -> list[Sequence]:
    """What the teacher says of each document on its own, in float32."""
    tokenizer = load_tokenizer(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    found = []
    for text in make_sentences(count, seed=5):
        tokens = [*tokenizer(text)["input_ids"][: LONGEST - 1], 0]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, :-1, :300].double()
        values, ids = logits.log_softmax(-1).topk(K)
        found.append(Sequence(tokens, ids.numpy(), values.numpy()))
    return found


def capture_of(
    folder: Path, sequences: list[Sequence], about: dict[str, Any] | None = COMPRESSION
) -> Path:
    """One sequence per row, as the capture by vLLM writes them: without targets of the last."""
    rows = []
    for one in sequences:
        columns, _ = columns_of(one.ids, one.logprobs, about)
        rows.append({"input_ids": one.tokens, **columns})
    return write_capture(folder, rows, about)


def import_params(params: Params, **corpus: Any) -> Params:
    """Params for these documents, all of which are taken."""
    values = {
        "row_length": 128,
        "train_tokens": None,
        "validation_tokens": 10_000,
        "max_document_tokens": None,
        "validation_fraction": 0.3,
    }
    return change(params, corpus=values | corpus, prepare={"k": K, "shard_rows": 4})
