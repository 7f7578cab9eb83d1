"""What the documents tell a user to type exists: in English, README.md with docs/; in Chinese."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config.params import Params, all_keys, load_params
from tests.helpers import ROOT

ENGLISH = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHINESE = ROOT / "README.zh.md"
KEYS = set(all_keys(Params))
RECIPE = "docs/recipes/wikipedia-zh-t4.yaml"


@pytest.fixture(params=[ENGLISH, [CHINESE]], ids=["english", "chinese"])
def text(request: pytest.FixtureRequest) -> str:
    pages: list[Path] = request.param
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def test_files_that_are_named_exist(text: str) -> None:
    named = set(
        re.findall(r"\b(?:stages|docs|pipeline|tests)/[\w./-]+\.(?:py|yaml|md|ipynb)\b", text)
    )
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_keys_that_are_named_exist(text: str) -> None:
    sections = "|".join(Params.model_fields)
    named = set(re.findall(rf"[`'\s(]((?:{sections})\.[a-z_][a-z_0-9.]*[a-z0-9])[`'=:\s]", text))
    assert named
    named -= {"corpus.zarr", "run.json", "study.json", "study.md"}  # files
    assert named <= KEYS, sorted(named - KEYS)


def test_what_is_set_is_accepted(text: str) -> None:
    given = re.findall(r"--set\s+'?([a-z_.0-9]+=[\w.-]+)", text)
    assert given
    for override in given:
        load_params(ROOT / "params.yaml", [override])


def test_make_has_the_targets(text: str) -> None:
    targets = set(re.findall(r"^    make (\w+)", text, re.MULTILINE))
    assert targets >= {"demo", "test"}
    phony = (ROOT / "Makefile").read_text().split(".PHONY:")[1].splitlines()[0].split()
    assert targets <= set(phony)


def test_the_hours_of_the_recipe_are_those_at_its_head(text: str) -> None:
    plan = (ROOT / RECIPE).read_text()
    [(time, unit)] = re.findall(r"# advise: ([\d.]+) (h|min) in all on 1 x t4", plan)
    words = {"h": "h|小时", "min": "min|分钟"}[unit]
    assert re.search(rf"\b{re.escape(f'{float(time):g}')} (?:{words})", text)


def test_chinese_introduction_is_short_and_names_the_english_one() -> None:
    text = CHINESE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert "(README.md)" in text
    assert "README.zh.md" in ENGLISH[0].read_text(encoding="utf-8")
