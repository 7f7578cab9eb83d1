"""Score the teacher and models side by side on the validation rows, against the LIVE teacher.

All models are in memory at once, so that the teacher, which costs as much as all others together,
runs over the rows only once. If they do not fit, evaluate a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.delivery_params import EvaluateParams
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE, Rows, row_labels
from pipeline.errors import DecantError
from pipeline.evaluation.metrics import PositionScores
from pipeline.evaluation.models import JudgedModel
from pipeline.evaluation.results import TEACHER, CalibrationBin, Scores
from pipeline.model.attention_mask import documents_apart
from pipeline.runtime.bootstrap import Interval, clusters_of, intervals
from pipeline.runtime.console import announce, progress
from pipeline.runtime.device import seconds_of
from pipeline.runtime.transfer import to_device
from pipeline.teacher.teacher import Teacher


@dataclass(frozen=True)
class Comparison:
    """Results by model name, the teacher's first."""

    scores: dict[str, Scores]
    calibration: list[CalibrationBin]  # the reliability diagrams of all models
    parameters: dict[str, int]
    differences: dict[str, dict[str, Interval]]  # first model minus this one, by metric
    resampled: str  # what intervals are resampled from, for example "96 documents"


@torch.no_grad()
def compare(
    teacher: Teacher,
    models: Mapping[str, JudgedModel],
    corpus: CorpusSplit,
    params: EvaluateParams,
    document_mask: bool,
) -> Comparison:
    """Score the teacher and each model on all rows of a split; logits are float32.

    Raises:
        DecantError: a model's predictions are not finite, or no token of the split is in the loss.
    """
    found = _scores((TEACHER, *models), corpus.info.num_positions, params, teacher.device)
    _announce(teacher, models, corpus, params, document_mask)
    documents, row_numbers = [], []
    for first in progress(range(0, len(corpus), params.batch_rows), what="evaluate", unit="batch"):
        rows = corpus.rows(first, min(first + params.batch_rows, len(corpus)))
        labels = row_labels(rows)
        _judge(teacher, models, rows, labels, document_mask, found)
        place = (labels != IGNORE).numpy()
        documents.append(rows.doc_ids[place])
        row_numbers.append(first + place.nonzero()[0])
    if not any(map(len, documents)):
        raise DecantError(
            "no token of the corpus's validation rows is in the loss: raise "
            "corpus.validation_fraction, or set corpus.loss_on=all, and make it again"
        )
    clusters, resampled = clusters_of(documents, row_numbers)
    scores = {name: positions.scores(clusters) for name, positions in found.items()}
    scores[TEACHER].interval.pop("kl_to_teacher", None)  # it is 0 by definition
    return Comparison(
        scores=scores,
        calibration=[part for positions in found.values() for part in positions.calibration()],
        parameters={
            TEACHER: teacher.num_parameters,
            **{name: model.parameters for name, model in models.items()},
        },
        differences=_differences({name: found[name] for name in models}, clusters),
        resampled=resampled,
    )


def _scores(
    names: Iterable[str], positions: int, params: EvaluateParams, device: torch.device
) -> dict[str, PositionScores]:
    bins = params.calibration_bins
    return {name: PositionScores(positions, bins, name, device) for name in names}


def _announce(
    teacher: Teacher,
    models: Mapping[str, JudgedModel],
    corpus: CorpusSplit,
    params: EvaluateParams,
    document_mask: bool,
) -> None:
    at_once = params.batch_rows if teacher.device.type == "cuda" else 1
    rows = corpus.rows(0, min(at_once, len(corpus)))

    def judge() -> None:
        unused = _scores((TEACHER, *models), rows.tokens.size, params, teacher.device)
        _judge(teacher, models, rows, row_labels(rows), document_mask, unused)
        for scores in unused.values():
            scores.values()  # a model that has diverged is reported now, not after all rows

    announce(
        "evaluate",
        f"judges {', '.join(models)} against {teacher.describe()} on {len(corpus):,} rows",
        seconds_of(judge, teacher.device) * len(corpus) / len(rows),
    )


def _judge(
    teacher: Teacher,
    models: Mapping[str, JudgedModel],
    rows: Rows,
    labels: Tensor,
    document_mask: bool,
    found: Mapping[str, PositionScores],
) -> None:
    """Add the scores of teacher and models on the positions of these rows that have a label."""
    tokens = to_device(torch.from_numpy(rows.tokens), teacher.device)
    apart = documents_apart(torch.from_numpy(rows.doc_ids), document_mask)
    labels = labels.flatten()
    # Found on the CPU, since a GPU would have to be waited for
    positions = (labels != IGNORE).nonzero()[:, 0]
    places = to_device(positions, teacher.device)
    targets = to_device(labels[positions], teacher.device)
    states = {name: model.states(tokens, apart) for name, model in models.items()}
    for chunk, teacher_logits in teacher.logits_by_chunk(tokens, apart, positions):
        log_p = teacher_logits.log_softmax(-1)
        found[TEACHER].add(teacher_logits, targets[chunk], log_p)
        for name, model in models.items():
            logits = model.logits(states[name][places[chunk]])
            found[name].add(logits, targets[chunk], log_p)


def _differences(
    found: Mapping[str, PositionScores], clusters: NDArray[np.int64]
) -> dict[str, dict[str, Interval]]:
    """Return intervals of the first model minus each other one, position by position."""
    first, *others = found
    values = found[first].values()
    return {
        name: intervals(
            {key: values[key] - other for key, other in found[name].values().items()}, clusters
        )
        for name in others
    }
