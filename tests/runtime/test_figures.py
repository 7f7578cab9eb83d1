"""SVG for a page and SVG for a file of its own."""

from __future__ import annotations

import re
from typing import Any

from pipeline.runtime.figures import SERIES, draw_svg


def line(axes: Any) -> None:
    axes.plot([1, 2], label="a$b$ <c>")
    axes.fill_between([0, 1], [1, 2])


def test_a_picture_of_a_page_takes_its_colours() -> None:
    svg = draw_svg([line], alt='A "line" <b>')
    assert svg.startswith('<svg role="img" aria-label="A &quot;line&quot; &lt;b&gt;"')
    assert "currentColor" in svg
    assert f"var(--series-1, {SERIES[0]})" in svg
    assert "a$b$ &lt;c&gt;" in svg  # no mathematics
    assert "<metadata" not in svg


def test_ids_are_a_pictures_own() -> None:
    def other(axes: Any) -> None:
        axes.plot([2, 1])

    ids = [set(re.findall(r'\bid="([^"]*)"', draw_svg([draw]))) for draw in (line, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    svg = draw_svg([line])
    for target in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg):
        assert "".join(target) in ids[0]
    assert svg == draw_svg([line])


def test_a_file_of_its_own_needs_no_page() -> None:
    svg = draw_svg([line], background="white")
    assert "var(" not in svg
    assert SERIES[0] in svg
