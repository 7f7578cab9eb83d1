"""Chat templates as programs: limited in time, the same on every day, and what they mark."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise

RENDER_SECONDS = 5.0
"""Time limit for one rendering, since a template is a program and may loop forever.

The largest real templates take milliseconds.
"""

_DATE = datetime(2024, 7, 26)  # the default date in Llama 3's template
_DIRECTIVES = "%-d %-m %-H %-I %-M %-S %-j %a %A %b %B %d %e %F %H %I %j %m %M %p %S %T %y %Y"


class RenderTimeout(BaseException):
    """The time is up; not an Exception, since a template's filters might catch that."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise RenderTimeout in the main thread once the time is up; other threads have no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def expire(*_: object) -> None:
        raise RenderTimeout

    handler = signal.signal(signal.SIGALRM, expire)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def with_fixed_date(template: str) -> str:
    """Give a template its own `strftime_now`, which does not depend on the current day."""
    if "strftime_now" not in template:
        return template
    values = {directive: _DATE.strftime(directive) for directive in _DIRECTIVES.split()}
    written = "".join(f"|replace({name!r}, {value!r})" for name, value in values.items())
    # `trim_blocks` removes the line break after the block, so the template itself is unchanged.
    return (
        f"{{% macro strftime_now(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n{template}"
    )


def marks_turns(template: str) -> bool:
    """Return whether the template encloses generated text in {% generation %}."""
    import jinja2

    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateError:
        return False  # rendering will report what is wrong with it
    words = [(kind, word) for _, kind, word in tokens if kind != "whitespace"]
    return any(
        kind == "block_begin" and after == ("name", "generation")
        for (kind, _), after in pairwise(words)
    )
