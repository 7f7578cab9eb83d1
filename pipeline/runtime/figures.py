"""Figures as SVG by matplotlib, in one style for the report's page and for separate files.

matplotlib is optional and takes a second to import, so it is imported only when a figure is drawn.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from pipeline.runtime.optional import require

INK = "#010203"  # stands for the colour of the surrounding text until the SVG is written
SERIES = ("#8c2f4a", "#b0761f", "#566b82", "#2e7d6b", "#7a5ea8", "#8a5a44")
"""Line colours on a light background; a page may set its own as --series-1, --series-2, ..."""
_PANEL_INCHES = (5.2, 3.1)


def draw_svg(
    panels: Sequence[Callable[[Any], None]],
    *,
    background: str = "none",
    inches: tuple[float, float] | None = None,
    alt: str = "",
) -> str:
    """Draw an SVG element in the colour of the surrounding text, or in black in a separate file.

    Args:
        panels: functions that each draw into the given matplotlib axes; they are placed side by
            side.
        background: background colour, as matplotlib names it; "none" for a figure within a page,
            which takes the page's colours.
        inches: width and height of one panel; None for the default size.
        alt: description of the figure for readers who cannot see it.

    Raises:
        DecantError: matplotlib is not installed.
    """
    mpl = require("matplotlib", "report", "a picture")
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "decant",  # so that the same input gives the same file
        "text.parse_math": False,  # a run may be called a$b$
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.prop_cycle": f"cycler('color', {list(SERIES)})",
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
        ),
    }
    with mpl.rc_context(style):
        width, height = inches or _PANEL_INCHES
        figure = Figure(figsize=(width * len(panels), height), layout="constrained")
        for number, draw in enumerate(panels, start=1):
            axes = figure.add_subplot(1, len(panels), number)
            draw(axes)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False)
            axes.grid(color=INK, alpha=0.12, linewidth=0.6)
            axes.set_axisbelow(True)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", facecolor=background, metadata=nothing)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return _for_a_page(svg, alt) if background == "none" else svg


def _for_a_page(svg: str, alt: str) -> str:
    """Adapt an SVG to a page: unique ids, the page's colours, and a description."""
    own = f"i{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}", svg)
    for number, colour in enumerate(SERIES, start=1):
        svg = svg.replace(colour, f"var(--series-{number}, {colour})")
    words = f' role="img" aria-label="{escape(alt)}"' if alt else ""
    return svg.replace("<svg", f"<svg{words}", 1)
