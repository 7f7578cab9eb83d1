"""The study as one self-contained HTML page and one Markdown file, from the same sections.

In the page, pictures are embedded and their ink takes the page's colour; for the Markdown file they
are separate files beside it, on white. The templates are report.html and report.md.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline.io.files import write_bytes, write_text
from pipeline.runtime.figures import draw_svg
from pipeline.runtime.optional import require
from pipeline.study.section import Section, shown

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def require_packages() -> None:
    """Check for the packages of the report before the work, which would otherwise be wasted.

    Raises:
        DecantError: jinja2 or matplotlib is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        require(package, "report", "the study")


def write_study(folder: Path, about: str, device: str, sections: Sequence[Section]) -> Path:
    """Write index.html, report.md, their pictures and the sections' files.

    Args:
        about: one line about the model.
        device: one line about the device that it ran on.

    Returns:
        The path of the page.

    Raises:
        DecantError: jinja2 or matplotlib is not installed.
    """
    require_packages()
    from jinja2 import Environment

    comparisons = [comparison for section in sections for comparison in section.comparisons]
    values = {
        "about": about,
        "sections": sections,
        "total": len(comparisons),
        "passed": sum(comparison.passed for comparison in comparisons),
        "versions": {name: version(name) for name in _PACKAGES},
        "device": device,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    pictures = [picture for section in sections for picture in section.pictures]
    figures = {p.name: draw_svg(p.panels, inches=p.inches) for p in pictures}
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    html, text = Environment(autoescape=True, **options), Environment(**options)
    html.filters["shown"] = text.filters["shown"] = shown
    text.filters["cell"], text.filters["fenced"] = _cell, _fenced
    for p in pictures:
        svg = draw_svg(p.panels, inches=p.inches, background="white")
        write_text(folder / f"{p.name}.svg", svg)
    for section in sections:
        for name, content in section.files.items():
            write_bytes(folder / name, content)
    write_text(folder / "report.md", text.from_string(_template("report.md")).render(values))
    target = folder / "index.html"
    page = html.from_string(_template("report.html")).render(values, figures=figures)
    write_text(target, page)
    return target


def _template(name: str) -> str:
    return files("pipeline.study").joinpath(name).read_text()


def _cell(value: object) -> str:
    """Escape a Markdown table cell: anything that would end the cell or be taken for markup."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", str(value)).replace("\n", " ")


def _fenced(text: str) -> str:
    """Return a code block, fenced by more backticks than the text contains."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip(chr(10))}\n{fence}"
