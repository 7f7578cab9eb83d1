"""The documents: a README that stays short, and links that lead to a file and a heading."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("**/*.md")),
]
LONGEST_README = 150  # lines; what is longer belongs into docs/
LINK = re.compile(r"\]\(<?([^()\s>]+)>?(?:\s+\"[^\"]*\")?\)")
BLOCK = re.compile(r"^```.*?^```|^ {4}.*?$", re.MULTILINE | re.DOTALL)  # of code
SPAN = re.compile(r"`[^`\n]+`")
FOLDERS = ("pipeline", "stages", "tests", "tools", "docs")
ELSEWHERE = {
    "execution.py",
    "generation/utils.py",
    "stages/x.py",
}
"""Files of other projects, and made-up ones, that comments and docstrings name."""


def links_of(text: str) -> list[str]:
    """Targets of links and pictures to files of this repository; code is left out."""
    targets = LINK.findall(SPAN.sub("", BLOCK.sub("", text)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors_of(text: str) -> set[str]:
    """What GitHub calls the headings: small letters, hyphens for spaces, repeats numbered."""
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", BLOCK.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return anchors


def broken(page: Path, target: str) -> str:
    """What is wrong with a link, in words; empty where it leads somewhere."""
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        return f"{target}: no such file"
    if not file.is_relative_to(ROOT):
        return f"{target}: outside of the repository"
    if anchor and anchor not in anchors_of(file.read_text(encoding="utf-8")):
        return f"{target}: no such heading"
    return ""


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_README, "move what is not what, run, layout or limits into docs/"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not [why for target in links_of(text) if (why := broken(page, target))]


def test_readme_leads_to_every_document() -> None:
    """Itself, or by a page that it leads to."""
    reached, todo = set(), {ROOT / "README.md"}
    while todo:
        page = todo.pop()
        reached.add(page)
        targets = links_of(page.read_text(encoding="utf-8"))
        files = {(page.parent / target.partition("#")[0]).resolve() for target in targets}
        todo |= {file for file in files if file.suffix == ".md"} - reached
    assert not set((ROOT / "docs").glob("**/*.md")) - reached


def test_broken_links_are_found() -> None:
    page = ROOT / "docs" / "guide.md"
    assert broken(page, "no-such-page.md") == "no-such-page.md: no such file"
    assert broken(page, "scale.md#no-such-heading") == "scale.md#no-such-heading: no such heading"
    assert not broken(page, "scale.md#which-mode")
    assert not broken(page, "#number-formats")
    text = "# A `b`, c\n## Twice\n## Twice\n\n    # no heading [x](y.md)\n[a](b.md#c) `[d](e.md)`\n"
    assert anchors_of(text) == {"a-b-c", "twice", "twice-1"}
    assert links_of(text + "![p](p.svg) [h](https://example.org) [t](q.md)") == [
        "b.md#c",
        "p.svg",
        "q.md",
    ]


def test_modules_named_in_comments_and_docstrings_exist() -> None:
    """By any part of their path, such as `io/files.py`; names of other projects stand in links."""
    files = [*ROOT.glob("*.py"), *(f for d in FOLDERS for f in (ROOT / d).rglob("*.py"))]
    paths = {"/" + str(file.relative_to(ROOT)) for file in files}
    for file in files:
        for name in re.findall(r"(?<![\w./-])([a-z_]+(?:/[a-z_]+)*\.py)\b", words_of(file)):
            known = any(path.endswith("/" + name) for path in paths)
            assert known or name in ELSEWHERE, f"{file} names {name}, which does not exist"


def words_of(file: Path) -> str:
    """The comments and docstrings of a module."""
    source = file.read_text(encoding="utf-8")
    docstrings = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join([*docstrings, *comments])


def test_file_names_are_unique_in_the_package() -> None:
    """So that a name in a comment or an editor's tab says which file it is."""
    names = Counter(file.name for file in (ROOT / "pipeline").rglob("*.py"))
    del names["__init__.py"]
    assert not [name for name, count in names.items() if count > 1]
