"""docs/architectures.md says what works, family by family; made again if a row differs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers.utils import logging

from tests.model.architectures import FAMILIES, PAGE, measure

TEXT = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(?!model_type).*$", TEXT, re.MULTILINE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_page_says_what_works(kind: str, tmp_path: Path) -> None:
    logging.set_verbosity_error()
    row = str(measure(kind, tmp_path))
    assert row in ROWS, "run: python -m tests.model.architectures > docs/architectures.md"


def test_the_page_is_the_generated_one() -> None:
    assert [row.split("`")[1] for row in ROWS] == list(FAMILIES)
    assert PAGE.format(rows="\n".join(ROWS)) == TEXT
