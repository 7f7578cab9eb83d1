"""Pictures as SVG by matplotlib, in one style for the report's page and for files of their own.

matplotlib is optional and takes a second to import, so it is imported when a picture is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.errors import DecantError

INK = "#010203"  # stands for the colour of the surrounding text until the SVG is written
_PANEL_INCHES = (5.2, 3.1)


def draw_svg(
    panels: Sequence[Callable[[Any], None]],
    *,
    background: str = "none",
    inches: tuple[float, float] | None = None,
) -> str:
    """An SVG element whose ink is the colour of the text about it; black in a file of its own.

    Args:
        panels: each draws into the matplotlib axes it is given; they stand side by side.
        background: what lies behind them, a colour of matplotlib's.
        inches: width and height of one panel; None for the usual size.

    Raises:
        DecantError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise DecantError(
            "pictures need matplotlib: install it by `pip install decant[report]`"
        ) from None
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "decant",  # the same input makes the same file
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
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
        figure.savefig(stream, format="svg", facecolor=background, metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
