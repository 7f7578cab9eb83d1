from __future__ import annotations

import math

import pytest
import torch

from pipeline.config import Params
from pipeline.data.packing import IGNORE, next_token_labels
from pipeline.data.rows import CorpusSplit
from pipeline.evaluation.compare import compare, sample
from pipeline.evaluation.metrics import ScoreSums
from pipeline.model.attention import document_positions
from pipeline.model.weights import load_student
from pipeline.training.run import run_training
from tests.helpers import live_teacher


def test_worked_by_hand() -> None:
    """Two positions; the model says (0.8, 0.2) twice, the labels are 0 and 1."""
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
    teacher = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()
    sums = ScoreSums(bins=10)
    sums.add(logits, torch.tensor([0, 1]), teacher)
    scores = sums.scores()
    assert scores.loss == pytest.approx(-(math.log(0.8) + math.log(0.2)) / 2)
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))
    first = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    second = 0.1 * math.log(0.1 / 0.8) + 0.9 * math.log(0.9 / 0.2)
    assert scores.kl_to_teacher == pytest.approx((first + second) / 2, rel=1e-5)
    assert scores.accuracy == 0.5
    assert scores.top1_agreement == 0.5  # argmax of the tie is id 0
    assert scores.calibration_error == pytest.approx(0.3)  # confident 0.8, right 0.5
    (point,) = sums.calibration()
    assert point == pytest.approx({"confidence": 0.8, "accuracy": 0.5, "share": 1.0})


def test_chunks_do_not_matter() -> None:
    logits, teacher = torch.randn(50, 30), torch.randn(50, 30).log_softmax(-1)
    labels = torch.randint(0, 30, (50,))
    whole, parts = ScoreSums(15), ScoreSums(15)
    whole.add(logits, labels, teacher)
    for rows in torch.arange(50).split(7):
        parts.add(logits[rows], labels[rows], teacher[rows])
    for name, value in vars(whole.scores()).items():
        assert getattr(parts.scores(), name) == pytest.approx(value, rel=1e-6)


def test_perfect_calibration_has_no_error() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.full((40_000,), 0.7)
    labels = (torch.rand(40_000, generator=generator) > p).long()
    logits = torch.stack([p, 1 - p], dim=-1).log()
    sums = ScoreSums(10)
    sums.add(logits, labels, logits)
    assert sums.scores().calibration_error < 0.01
    assert sums.scores().kl_to_teacher == pytest.approx(0.0, abs=1e-6)


def test_compare_against_full_logits(tiny_cache: Params) -> None:
    run = run_training(tiny_cache, "student").folder / "model"
    corpus = CorpusSplit(tiny_cache.paths.corpus, "validation")
    teacher = live_teacher(tiny_cache)
    result = compare(teacher, {"student": run}, corpus, tiny_cache.evaluate, "documents")
    rows = corpus.rows(0, len(corpus))
    tokens, doc_ids = torch.from_numpy(rows.tokens), torch.from_numpy(rows.doc_ids)
    labels = next_token_labels(tokens, doc_ids, torch.from_numpy(rows.in_loss))
    wanted = labels != IGNORE
    with torch.no_grad():
        positions = document_positions(doc_ids)
        logits = teacher.model(tokens, position_ids=positions, use_cache=False).logits
        log_p = logits[..., :300][wanted].log_softmax(-1)
        log_q = load_student(run)(tokens, doc_ids)[wanted].log_softmax(-1)
    student, itself = result.scores["student"], result.scores["teacher"]
    loss = torch.nn.functional.nll_loss(log_q, labels[wanted])
    assert student.loss == pytest.approx(float(loss), rel=1e-5)
    kl = (log_p.exp() * (log_p - log_q[:, :300])).sum(-1).mean()
    assert student.kl_to_teacher == pytest.approx(float(kl), rel=1e-4)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean()
    assert student.top1_agreement == pytest.approx(float(agreement), abs=2e-3)
    assert itself.kl_to_teacher == pytest.approx(0.0, abs=1e-6)
    assert itself.top1_agreement == 1.0
    assert student.tokens == int(wanted.sum())
    (text,) = sample(run, ("the cat",), 3)
    assert isinstance(text, str)
