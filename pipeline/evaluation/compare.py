"""Teacher and students judged side by side on the validation rows, against the LIVE teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config import EvaluateParams
from pipeline.data.corpus import load_tokenizer
from pipeline.data.packing import IGNORE, next_token_labels
from pipeline.data.rows import CorpusSplit
from pipeline.errors import DecantError
from pipeline.evaluation.metrics import Scores, ScoreSums
from pipeline.generation import GenerationSettings
from pipeline.model.weights import load_student, read_config
from pipeline.runtime import import_transformers, mm_float32, progress
from pipeline.teacher.hf import HuggingFaceTeacher
from pipeline.text_generator import TextGenerator


@dataclass(frozen=True)
class Comparison:
    """Per model name: scores, reliability diagram, parameters."""

    scores: dict[str, Scores]
    calibration: dict[str, list[dict[str, Any]]]
    parameters: dict[str, int]


@torch.no_grad()
def compare(
    teacher: HuggingFaceTeacher,
    students: Mapping[str, Path],
    corpus: CorpusSplit,
    params: EvaluateParams,
) -> Comparison:
    """Scores of the teacher and of each student folder on all rows of a split.

    Students run in the teacher's number format under autocast, as they were trained; logits are
    float32 for all.
    """
    models = {name: load_student(path).to(teacher.device).eval() for name, path in students.items()}
    heads = {name: model.head_weight.detach() for name, model in models.items()}
    if teacher.device.type == "cpu":  # see mm_float32
        heads = {name: head.float() for name, head in heads.items()}
    sums = {name: ScoreSums(params.calibration_bins) for name in ("teacher", *models)}
    starts = range(0, len(corpus), params.batch_rows)
    half = teacher.dtype != torch.float32
    for first in progress(starts, what="evaluate", unit="batch"):
        rows = corpus.rows(first, min(first + params.batch_rows, len(corpus)))
        tokens = torch.from_numpy(rows.tokens).to(teacher.device)
        doc_ids = torch.from_numpy(rows.doc_ids).to(teacher.device)
        labels = next_token_labels(tokens, doc_ids).flatten()
        with torch.autocast(teacher.device.type, dtype=teacher.dtype, enabled=half):
            hidden = {name: m.hidden_states(tokens).flatten(0, 1) for name, m in models.items()}
        for chunk, teacher_logits in teacher.logits_by_chunk(tokens):
            wanted = labels[chunk] != IGNORE
            target = labels[chunk][wanted]
            log_p = teacher_logits[wanted].log_softmax(-1)
            sums["teacher"].add(teacher_logits[wanted], target, log_p)
            for name in models:
                logits = mm_float32(hidden[name][chunk][wanted], heads[name].T, teacher.dtype)
                sums[name].add(logits, target, log_p)
    parameters = {name: model.count_parameters() for name, model in models.items()}
    return Comparison(
        scores={name: total.scores() for name, total in sums.items()},
        calibration={name: total.calibration() for name, total in sums.items()},
        parameters={"teacher": teacher.model.num_parameters(), **parameters},
    )


def sample(folder: Path, prompts: tuple[str, ...], new_tokens: int) -> list[str]:
    """Greedy continuations of prompts by a Hugging Face folder, on the CPU in float32.

    Ours generates for the folders that it reads; a teacher may be of another architecture, and
    then transformers does.
    """
    settings = GenerationSettings(max_new_tokens=new_tokens, temperature=0.0, repetition_penalty=1)
    try:
        read_config(folder)
    except DecantError:
        return _sample_by_transformers(folder, prompts, new_tokens)
    return TextGenerator(folder).generate(prompts, settings)


def _sample_by_transformers(folder: Path, prompts: tuple[str, ...], new_tokens: int) -> list[str]:
    tokenizer = load_tokenizer(folder)
    model: Any = import_transformers().AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True
    )
    texts = []
    for prompt in progress(prompts, what=f"samples of {folder.name}", unit="prompt"):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        new = output[0][inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts
