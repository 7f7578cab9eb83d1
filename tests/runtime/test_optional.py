"""Extras: what a message says of one that is absent, and that none names a stranger's package."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline.errors import DecantError
from pipeline.runtime.optional import install_hint, require

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# The package index has a `decant` of another author. Only pyproject.toml refers to its own extras.
BY_NAME = re.compile(
    r"\b(install|download|add|wheel)\s+((-\S+|constraints\.txt)\s+)*['\"]?decant\b(?![-/])"
    r"|\bdecant\["
)


def named(text: str) -> list[str]:
    return [match.group() for match in BY_NAME.finditer(text)]


@pytest.mark.parametrize(
    "text",
    [
        "pip install decant",
        "pip install\ndecant[ray]",
        "pip install -U 'decant>=1'",
        "pip install -c constraints.txt decant",
        "uv pip install decant",
        "uv add decant",
        "needs decant[llama]",
    ],
)
def test_the_pattern_finds_the_strangers_package(text: str) -> None:
    assert named(text)


def test_the_pattern_admits_our_own_folder() -> None:
    assert not named("pip install -c constraints.txt -e '.[demo]'; pip install decant-like")


def test_no_file_names_the_strangers_package() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert ROOT / "README.md" in files
    found = {
        str(file.relative_to(ROOT)): names
        for file in files
        if file.is_file() and file != Path(__file__)
        if (names := named(file.read_text(errors="replace")))
    }
    assert found == {"pyproject.toml": ["decant["] * 3}


def test_every_extra_that_is_named_exists() -> None:
    sources = "".join(file.read_text() for file in ROOT.glob("pipeline/**/*.py"))
    extras = set(re.findall(r"install_hint\(['\"]([^'\"]+)", sources))
    extras |= set(re.findall(r"require\((?:\"\w+\"|package), \"([^\"]+)", sources))
    of_stages = {"eval", "gguf", "llama", "lm-eval", "lora", "objects", "ray", "report"}
    assert extras == of_stages | {"mlflow", "tensorboard", "trl", "wandb"}
    assert extras <= PYPROJECT["project"]["optional-dependencies"].keys()


def test_an_absent_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DecantError) as caught:
        require("ray", "ray", "--executor ray", instead=", or leave it out")
    message = str(caught.value)
    assert message.startswith("--executor ray needs the package ray (")
    assert message.endswith(f"): {install_hint('ray')}, or leave it out")
    assert "`pip install -e '.[ray]'`" in message


def test_a_package_that_does_not_import_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_extra.py").write_text("raise ImportError('libabsent.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DecantError, match=r"broken_extra \(libabsent\.so is missing\)"):
        require("broken_extra", "ray", "this")
