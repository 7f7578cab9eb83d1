"""Addresses of folders: a path, or a prefix in an object store."""

from __future__ import annotations

from pathlib import Path

_SCHEMES = ("s3", "gs")


class Url(str):
    """Address of a prefix in an object store, without a trailing slash."""

    __slots__ = ()

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self}/{name}")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.rpartition("/")[2]


Address = Path | Url
"""A path, or a prefix in an object store."""


def parse_address(value: object) -> Address:
    """Convert a value to a Path, or to a Url if it has a scheme.

    Raises:
        ValueError: the scheme is neither s3 nor gs, or there is no bucket.
    """
    text = str(value)
    scheme, has_scheme, _ = text.partition("://")
    if not has_scheme:
        return Path(text)
    if scheme not in _SCHEMES:
        raise ValueError(f"the scheme {scheme}:// is not known: use a path, s3:// or gs://")
    if not text.partition("://")[2].strip("/"):
        raise ValueError(f"{text} names no bucket: write {scheme}://bucket/prefix")
    return Url(text.rstrip("/"))
