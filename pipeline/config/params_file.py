"""Read a params file and apply `--set key=value`, without any knowledge of what the values mean.

The file is YAML, read by PyYAML's safe loader with stricter rules. A key that appears twice in a
mapping is refused, since one of the two values would be lost silently; so are numbers of hundreds
of digits, and aliases that expand to more values than any params file has. Overrides follow Hydra's
grammar, as in `dvc exp run -S`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ParamsError, shortened

_MAX_BYTES = 2**20
_MAX_VALUES = 20_000
_MAX_DIGITS = 100
_MAX_OVERRIDE = 10_000  # characters


def read_params_file(file: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the sections of a params file and apply the overrides.

    Raises:
        ParamsError: the file cannot be read, or holds no sections; the message says where.
    """
    try:
        with file.open("rb") as stream:  # the file may be a pipe, but not an endless one
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ParamsError(
            f"{file} cannot be read ({error.strerror}): name it by --params"
        ) from None
    if len(data) > _MAX_BYTES:
        raise ParamsError(f"{file} has more than {_MAX_BYTES:,} bytes: it is no params file")
    try:
        values = load_yaml(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ParamsError(f"{file} is not UTF-8 text ({error.reason}): save it as that") from None
    except ValueError as error:
        raise ParamsError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{file} must hold a mapping of sections, as params.yaml does")
    if strange := [key for key in values if not isinstance(key, str)]:
        raise ParamsError(f"{file} has a section named {strange[0]!r}: names are words")
    for override in overrides:
        _apply(values, override)
    return values


def load_yaml(text: str) -> Any:
    """Parse one YAML document of plain values.

    Raises:
        ValueError: the document is not valid; the message is part of a sentence and says where.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _require_plain(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        said = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(where + " ".join(said.split())) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, changed to raise only YAMLError."""

    def construct_scalar_value(self, node: yaml.ScalarNode) -> Any:
        """Construct a scalar; PyYAML raises various errors if a value does not fit its tag."""
        kind = node.tag.rpartition(":")[2]
        if len(node.value) > _MAX_DIGITS:
            raise _error(node, f"a number of {len(node.value):,} digits")
        try:
            return getattr(self, f"construct_yaml_{kind}")(node)
        except (ArithmeticError, AttributeError, LookupError, ValueError):
            raise _error(node, f"{shortened(node.value)} is no {kind}") from None


for _kind in ("bool", "int", "float", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_scalar_value)


def _error(node: yaml.Node, what: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=what, problem_mark=node.start_mark)


def _require_plain(root: yaml.Node) -> None:
    """Refuse duplicate keys, and aliases that contain themselves or expand to too many values."""
    counts: dict[int, int] = {}

    def count(node: yaml.Node) -> int:
        known = counts.get(id(node))
        if known is not None:
            if not known:
                raise _error(node, "an anchor holds itself")
            return known
        counts[id(node)] = 0  # being counted
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(map(count, node.value))
        elif isinstance(node, yaml.MappingNode):
            _require_distinct([key for key, _ in node.value])
            total += sum(count(key) + count(value) for key, value in node.value)
        counts[id(node)] = total
        return total

    if (total := count(root)) > _MAX_VALUES:
        shown = f"{total:,}" if total < 10**15 else "more than 10^15"
        raise _error(root, f"its anchors expand to {shown} values, the limit is {_MAX_VALUES:,}")


def _require_distinct(keys: Sequence[yaml.Node]) -> None:
    lines: dict[str, int] = {}
    for key in keys:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if (first := lines.get(key.value)) is not None:
                raise _error(
                    key, f"the key {shortened(key.value)} is there already, on line {first}"
                )
            lines[key.value] = key.start_mark.line + 1


def _apply(values: dict[str, Any], text: str) -> None:
    # Imported here, since the imports take longer than everything else before a stage's own work.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    shown = text if len(text) <= 80 else f"{text[:80]}..."
    if len(text) > _MAX_OVERRIDE:
        raise ParamsError(
            f"--set {shown!r} has {len(text):,} characters, the limit is {_MAX_OVERRIDE:,}: write "
            "it into a file for --params"
        )
    try:
        override = OverridesParser.create().parse_override(text)
        is_sweep = override.is_sweep_override()
        value = None if is_sweep or override.is_delete() else override.value()
    except (HydraException, ValueError, OverflowError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ParamsError(f"--set {shown!r} is not of the form key.path=value: {reason}") from None
    if is_sweep:
        raise ParamsError(
            f"--set {shown!r} names several values: `dvc exp run --queue -S` takes those"
        )
    if isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
        raise ParamsError(f"--set {shown!r} is a number of more than {_MAX_DIGITS} digits")
    *parents, leaf = override.key_or_group.split(".")
    node: Any = values
    for part in parents:
        if isinstance(node, dict) and node.get(part) is None:
            node[
                part
            ] = {}  # absent, or switched off as student.lora is: a key in it switches it on
        node = node[part] if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ParamsError(f"--set {shown!r}: {'.'.join(parents)} is not a section")
    if override.is_delete():
        node.pop(leaf, None)
    else:
        node[leaf] = value
