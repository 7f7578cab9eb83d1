"""Write params as YAML with a comment for every key: what it means and its bounds.

The words are the docstrings of the sections and their fields, so params.yaml cannot contradict the
code. `python -m stages.show_params` prints this text, and the repository's params.yaml is it for
the defaults.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.config.params import Params
from pipeline.config.section import Section

_COLUMNS = 100
_NO_BREAK = "\xa0"  # a space at which a comment is not wrapped
_HEAD = """\
# All parameters of the pipeline, as `python -m stages.show_params` writes them. Comments are from
# pipeline/config/; bounds are in brackets. A file given by --params may leave out keys, which then
# have their defaults; params.yaml may not, since DVC compares only what it says. Change a value for
# a single run by `--set key=value` (a stage) or `dvc exp run -S key=value`.

"""
_SIGNS = (
    ("minimum", ">="),
    ("exclusiveMinimum", ">"),
    ("maximum", "<="),
    ("exclusiveMaximum", "<"),
)


def params_text(params: Params) -> str:
    """Return a params file that holds every key, and says what each means."""
    return _HEAD + "\n".join(_lines(params, "")) + "\n"


def _lines(section: Section, indent: str) -> Iterator[str]:
    properties = type(section).model_json_schema()["properties"]
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            if not indent:
                yield ""
            yield from _comment(type(value).__doc__ or "", indent)
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
            continue
        words = " ".join([field.description or "", *_bounds(properties[name])])
        key, *items = _entry(name, values[name], indent)
        comment = _comment(words, indent)
        beside = f"{key} {comment[0].lstrip()}"
        fits = len(comment) == 1 and not items and len(beside) <= _COLUMNS
        yield from [beside] if fits else [*comment, key, *items]


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    lines = textwrap.wrap(
        re.sub(r"[ \n]+", " ", text),
        _COLUMNS,
        initial_indent=mark,
        subsequent_indent=mark,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _entry(name: str, value: Any, indent: str) -> list[str]:
    """Return a key and its value on one line, or a list too long for it with one item per line."""
    line = f"{indent}{name}: {yaml_value(value)}"
    if isinstance(value, list) and len(line) > _COLUMNS:
        return [f"{indent}{name}:", *(f"{indent}  - {yaml_value(item)}" for item in value)]
    return [line]


def yaml_value(value: Any) -> str:
    """Return a value as YAML on one line."""
    text: str = yaml.dump(
        [value], Dumper=_OneLine, default_flow_style=True, allow_unicode=True, width=float("inf")
    )
    return text.strip()[1:-1]


class _OneLine(yaml.SafeDumper):
    """PyYAML's safe dumper, which escapes line ends instead of writing them."""


def _quote_line_ends(dumper: _OneLine, text: str) -> yaml.ScalarNode:
    style = None if text.splitlines() == [text] else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OneLine.add_representer(str, _quote_line_ends)


def _bounds(schema: dict[str, Any], each: str = "") -> Iterator[str]:
    """Say in brackets the bounds of a key, or of each item of its list, by its JSON schema."""
    for kind in schema.get("anyOf", [schema]):
        if kind.get("type") == "array":  # all items of a list have the same bounds
            yield from _bounds(
                kind["items"] if "items" in kind else kind["prefixItems"][0], "each "
            )
        if found := [f"{sign} {_number(kind[key])}" for key, sign in _SIGNS if key in kind]:
            yield f"[{each}{', '.join(found)}]".replace(" ", _NO_BREAK)


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"
