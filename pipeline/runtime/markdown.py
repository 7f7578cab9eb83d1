"""Tables in Markdown, for the terminal, the README, model cards and the study."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> str:
    """Return a table in GitHub's Markdown.

    Args:
        numbers: align all columns but the first to the right.
    """
    rule = f"|---|{('---:|' if numbers else '---|') * (len(head) - 1)}"
    first, *others = (f"| {' | '.join(map(_cell, line))} |" for line in (head, *rows))
    return "\n".join([first, rule, *others])


def _cell(text: str) -> str:
    """Escape what would end a cell, unless it is escaped already."""
    return re.sub(r"(?<!\\)\|", r"\|", text).replace("\n", " ")
