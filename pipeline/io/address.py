"""Addresses of folders: a path, a prefix in an object store, or a folder on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import unquote

_SCHEMES = ("s3", "gs")
_HUB = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@/\s]+))?(/(?P<folder>[^@\s]+))?"
)
HUB_FOLDERS = {"corpus": "corpus.zarr", "logits": "logits.zarr"}
"""Folder of a dataset repository in which `stages/share.py` puts what is at a key of `paths`."""


class Url(str):
    """Address of a prefix in an object store, without a trailing slash."""

    __slots__ = ()

    def __truediv__(self, name: str) -> Self:
        return type(self)(f"{self}/{name}")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.rpartition("/")[2]


class HubParts(NamedTuple):
    """The parts of an address on the hub."""

    repo_id: str  # ORG/NAME
    revision: str  # a branch, a tag or a commit
    folder: str  # empty for the whole repository


class HubUrl(Url):
    """Address of a folder in a dataset repository of the Hugging Face hub, which is only read.

    It has the form that huggingface_hub's file system uses, hf://datasets/ORG/NAME@REVISION/FOLDER.
    """

    __slots__ = ()

    @property
    def parts(self) -> HubParts:
        """The parts; without a revision, that of the default branch."""
        found = _HUB.fullmatch(self)
        assert found
        revision = unquote(found["revision"] or "main")  # refs%2Fpr%2F1 is a pull request
        return HubParts(found["repo"], revision, found["folder"] or "")


Address = Path | Url
"""A path, a prefix in an object store, or a folder on the hub."""


def parse_address(value: object) -> Address:
    """Convert a value to a Path, or to a Url if it has a scheme.

    Raises:
        ValueError: the scheme is not known, or no bucket or repository is named.
    """
    text = str(value)
    scheme, has_scheme, rest = text.partition("://")
    if not has_scheme:
        return Path(text)
    if scheme == "hf":
        if not _HUB.fullmatch(text.rstrip("/")):
            raise ValueError(
                f"{text} names no dataset repository: write hf://datasets/ORG/NAME@REVISION"
            )
        return HubUrl(text.rstrip("/"))
    if scheme not in _SCHEMES:
        raise ValueError(f"the scheme {scheme}:// is not known: use a path, s3://, gs:// or hf://")
    if not rest.strip("/"):
        raise ValueError(f"{text} names no bucket: write {scheme}://bucket/prefix")
    return Url(text.rstrip("/"))


def in_repository(address: Address, key: str) -> Address:
    """Return the folder of an address that names a whole repository; other addresses as they are.

    Args:
        key: "corpus" or "logits", the key of `paths` whose address this is.
    """
    if isinstance(address, HubUrl) and not address.parts.folder:
        return address / HUB_FOLDERS[key]
    return address
