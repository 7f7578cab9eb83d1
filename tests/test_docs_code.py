"""The Python in the documentation runs, as a reader would type it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.params import Params
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "integrations.md").read_text()
MOST_LINES = 15


def code_of(section: str) -> list[str]:
    """The fenced blocks of one section of the page."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def project(tiny_cache: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with corpus and cache under cache/, as the page has them, and models/start."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "start").symlink_to(Path(tiny_cache.paths.teacher).absolute())
    assert (tmp_path / "cache" / "logits.zarr").is_dir()
    return tmp_path


def run(blocks: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "integrations.md", "exec"), names)
    return names


def test_a_loop_of_your_own_and_a_stream(project: Path) -> None:
    loop = code_of("A loop of your own")
    assert len(loop) == 2
    assert len(loop[0].splitlines()) <= MOST_LINES
    names = run(loop + code_of("Streams, workers, ranks"))
    assert float(names["loss"]) > 0
    assert names["state"]


@pytest.mark.parametrize(("section", "package"), [("transformers", "transformers"), ("TRL", "trl")])
def test_the_trainers(section: str, package: str, project: Path) -> None:
    pytest.importorskip(package)
    blocks = code_of(section)
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) <= MOST_LINES
    trainer = run(blocks)["trainer"]
    assert trainer.state.global_step == trainer.state.max_steps > 0
