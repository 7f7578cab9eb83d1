from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from pipeline.errors import DecantError
from pipeline.evaluation.metrics import PositionScores, kl_divergence, kl_statistics


def test_worked_by_hand() -> None:
    """Two positions; the model says (0.8, 0.2) twice, the labels are 0 and 1."""
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
    teacher = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()
    sums = PositionScores(2, bins=10)
    sums.add(logits, torch.tensor([0, 1]), teacher)
    scores = sums.scores(np.array([0, 1]))
    assert scores.loss == pytest.approx(-(math.log(0.8) + math.log(0.2)) / 2)
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))
    first = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    second = 0.1 * math.log(0.1 / 0.8) + 0.9 * math.log(0.9 / 0.2)
    assert scores.kl_to_teacher == pytest.approx((first + second) / 2, rel=1e-5)
    assert scores.accuracy == 0.5
    assert scores.top1_agreement == 0.5  # argmax of the tie is id 0
    assert scores.calibration_error == pytest.approx(0.3)  # confident 0.8, right 0.5
    (point,) = sums.calibration()
    assert point.model == "the model"
    assert (point.confidence, point.accuracy, point.share) == pytest.approx((0.8, 0.5, 1.0))


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_what_is_no_number_is_one_sentence(bad: float) -> None:
    """Not an index out of range, nor a NaN that the report would have to show."""
    teacher = torch.zeros(2, 4).log_softmax(-1)
    logits = torch.tensor([[0.0, bad, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    scores = PositionScores(2, 10, "far")
    scores.add(logits, torch.tensor([0, 1]), teacher)
    with pytest.raises(DecantError, match="far predicts probabilities that are 0 or not numbers"):
        scores.scores(np.zeros(2, np.int64))


def test_chunks_do_not_matter() -> None:
    logits, teacher = torch.randn(50, 30), torch.randn(50, 30).log_softmax(-1)
    labels = torch.randint(0, 30, (50,))
    whole, parts = PositionScores(50, 15), PositionScores(60, 15)
    whole.add(logits, labels, teacher)
    for rows in torch.arange(50).split(7):
        parts.add(logits[rows], labels[rows], teacher[rows])
    documents = np.arange(50) // 5
    expected, found = (asdict(scores.scores(documents)) for scores in (whole, parts))
    assert expected.keys() == found.keys()
    for name in ("loss", "kl_to_teacher", "top1_agreement", "accuracy", "calibration_error", "kl"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    for name, interval in expected["interval"].items():
        assert found["interval"][name] == pytest.approx(interval, rel=1e-6)


def test_perfect_calibration_has_no_error() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.full((40_000,), 0.7)
    labels = (torch.rand(40_000, generator=generator) > p).long()
    logits = torch.stack([p, 1 - p], dim=-1).log()
    sums = PositionScores(40_000, 10)
    sums.add(logits, labels, logits)
    scores = sums.scores(np.arange(40_000) // 100)
    assert scores.calibration_error < 0.01
    assert scores.kl_to_teacher == pytest.approx(0.0, abs=1e-6)


def test_quantiles_by_hand() -> None:
    """Of 0, 1, ..., 10 in any order; between positions on a line, as llama.cpp does."""
    values = np.random.default_rng(0).permutation(11).astype(np.float32)
    found = kl_statistics(values)
    assert asdict(found) == pytest.approx(
        {"mean": 5.0, "median": 5.0, "p90": 9.0, "p95": 9.5, "p99": 9.9, "max": 10.0}
    )
    four = kl_statistics(np.array([4.0, 1.0, 2.0, 8.0], np.float32))
    assert (four.median, four.max) == (3.0, 8.0)
    assert four.p90 == pytest.approx(4.0 + 0.7 * 4.0)


def test_kl_is_never_negative_and_nothing_to_oneself() -> None:
    log_p = torch.randn(200, 5000).log_softmax(-1)
    same = kl_divergence(log_p, log_p)
    assert torch.equal(same, torch.zeros(200))
    rounded = kl_divergence(log_p, log_p + 1e-7 * torch.randn_like(log_p))
    assert float(rounded.min()) >= 0.0
