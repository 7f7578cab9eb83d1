"""Metadata in JSON: a checksum proves that it is what was written, and its types are checked.

The checksum is the key "crc32c" beside the other values: the CRC-32C of their JSON text, with
sorted keys and the separators "," and ":".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import google_crc32c
from pydantic import Field, TypeAdapter, ValidationError

Kind = TypeVar("Kind")
Number = Annotated[int, Field(ge=0, le=2**40)]
"""A count in metadata; a larger one is damage, or meant to exhaust the memory."""
Size = Annotated[int, Field(ge=1, le=2**40)]
Length = Annotated[int, Field(ge=1, le=2**24)]
"""The number of tokens in a row, or of ids in a vocabulary."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Crc = Annotated[int, Field(ge=0, lt=2**32)]


class DamagedError(ValueError):
    """Bytes that do not match their checksums or are malformed."""


def parse(kind: type[Kind], values: Any, what: str) -> Kind:
    """Convert JSON values to a dataclass, and check that each has its annotated type.

    A checksum proves that values are as they were written, but not who wrote them. Therefore the
    types of all metadata are checked here, so that no later code finds a list where it expects a
    number.

    Raises:
        DamagedError: a value has another type; the message names the first one.
    """
    try:
        found: Kind = _adapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        raise DamagedError(f"{what}: {where}: {first['msg']}") from None
    except RecursionError:
        raise DamagedError(f"{what} is nested too deeply") from None
    return found


_adapter: Callable[[Any], TypeAdapter[Any]] = lru_cache(TypeAdapter)


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720) of bytes."""
    return int(google_crc32c.value(data))


def add_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the key "crc32c", the crc32c of the values' JSON text."""
    return {**values, "crc32c": json_crc32c(values)}


def has_valid_checksum(values: Mapping[str, Any]) -> bool:
    """Return whether "crc32c" is that of the other values, which are then as they were written."""
    with suppress(RecursionError):
        rest = {name: value for name, value in values.items() if name != "crc32c"}
        return bool(values.get("crc32c") == json_crc32c(rest))
    return False


def json_crc32c(values: Mapping[str, Any]) -> int:
    """Return the crc32c of the values' JSON text: keys sorted, separators "," and ":"."""
    return crc32c(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())
