"""What passes and what does not."""

from __future__ import annotations

import pytest
import torch

from pipeline.study.comparison import Comparison, compare, compare_sequences, shown


def test_tolerance_grows_with_values_beyond_1() -> None:
    one, thousand = torch.ones(3), torch.full((3,), 1000.0)
    assert compare("", one + 9e-6, one).passed
    assert not compare("", one + 2e-5, one).passed
    assert compare("", thousand + 9e-3, thousand).passed
    assert not compare("", thousand + 2e-2, thousand).passed
    assert not compare("", 0.001 * one + 2e-5, 0.001 * one).passed  # it does not shrink


def test_large_vectors_do_not_cover_small_ones() -> None:
    """As in real models, whose first position reaches thousands where all others are near 1."""
    theirs = torch.ones(1, 5, 8)
    theirs[0, 0] *= 4000.0
    ours = theirs.clone()
    ours[0, 0] += 1e-2
    assert compare("", ours, theirs).passed
    ours[0, 3, 2] += 1e-3
    found = compare("", ours, theirs)
    assert not found.passed
    assert (found.measured, found.limit) == pytest.approx((1e-3, 1e-5), rel=1e-3)
    assert compare("", theirs, theirs) == Comparison(
        "", 0.0, 1e-5, (1, 5, 8)
    )  # the strictest, when equal


def test_nan_and_other_shapes_never_pass() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert not compare("", nan, torch.ones(2)).passed
    assert not compare("", torch.ones(2), nan).passed
    assert not compare("", nan, nan).passed
    assert not compare("", torch.ones(2), torch.ones(1)).passed
    assert not compare("", torch.full((1,), torch.inf), torch.ones(1)).passed
    assert not compare("", torch.ones(1), torch.full((1,), torch.inf)).passed
    assert not Comparison("", float("nan"), 1.0).passed


def test_tokens_are_counted_where_they_differ() -> None:
    assert compare_sequences("", [1, 2, 3], [1, 2, 3]).passed
    assert compare_sequences("", [1, 9, 3], [1, 2, 3]).measured == 1
    assert compare_sequences("", [1, 2], [1, 2, 3, 4]).measured == 2


def test_numbers_as_shown() -> None:
    assert [shown(value) for value in (0.0, 1.234e-7, 3.0)] == ["0", "1.2e-07", "3.0e+00"]
