"""The files of a Hugging Face model folder, without opening the model: their names and hashes."""

from __future__ import annotations

import hashlib
import shutil
import stat
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from pipeline.errors import DecantError
from pipeline.storage import MARK

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)

_OPENED = (".json", ".safetensors", ".jinja", ".txt", ".model")
"""Suffixes of what transformers opens in a folder."""


def require_regular_files(files: Iterable[Path]) -> None:
    """Refuse what exists and is no file: to open a pipe waits for ever, a device never ends.

    Raises:
        DecantError: names the first one.
    """
    for file in files:
        try:
            mode = file.stat().st_mode
        except OSError:  # absent, which is said where the file is needed
            continue
        if not stat.S_ISREG(mode):
            raise DecantError(
                f"{file} is not a regular file, as the files of a model are: put the file itself "
                "there"
            )


def require_regular_folder(folder: Path) -> None:
    """`require_regular_files` over all that a library may open in a model folder.

    Raises:
        DecantError: as `require_regular_files`.
    """
    if folder.is_dir():
        files = (file for file in sorted(folder.iterdir()) if file.suffix in _OPENED)
        require_regular_files(file for file in files if not file.is_dir())


def copy_files(source: Path, patterns: Iterable[str], target: Path) -> None:
    """Copy a model folder's files, by names or patterns, into another folder; absent ones are left.

    Raises:
        DecantError: as `files_to_copy`.
    """
    for file in files_to_copy(source, patterns):
        shutil.copyfile(file, target / file.name)


def files_to_copy(source: Path, patterns: Iterable[str]) -> list[Path]:
    """A model folder's files, by names or patterns, all of which may be copied.

    A link that leads out of a folder that Decant did not make is refused: a stranger's folder could
    have a private file copied, and published with the model, by linking to it. Only the hub's own
    cache, whose snapshots link to the files beside them, is followed. Decant's own folders may be
    links into DVC's cache.

    Raises:
        DecantError: names the link, or what is no regular file.
    """
    trusted = (source / MARK).exists()
    inside = [source.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    files = sorted(file for pattern in patterns for file in source.glob(pattern))
    require_regular_files(files)
    for file in files:
        whole = file.resolve()
        if not (trusted or any(whole.is_relative_to(folder) for folder in inside)):
            raise DecantError(
                f"{file} is a link to {whole}, outside of its folder, and is not followed: put the "
                "file itself there if it belongs to the model"
            )
    return files


def hash_weights(folder: Path) -> str:
    """sha256 over config.json and every *.safetensors file of a model folder, in name order."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if len(files) == 1:
        raise DecantError(
            f"{folder} holds no *.safetensors: run stages/fetch.py for a teacher, or name a folder "
            "that holds a model"
        )
    return _hash_files(files)


def hash_tokenizer(folder: Path) -> str:
    """sha256 of tokenizer.json: vocabulary, merges, splitting and normalisation."""
    return _hash_files([folder / "tokenizer.json"])


def _hash_files(files: Sequence[Path]) -> str:
    require_regular_files(files)
    total = hashlib.sha256()
    for file in files:
        try:
            about = file.stat()
            total.update(_hash_file(file, about.st_size, about.st_mtime_ns))
        except FileNotFoundError:
            raise DecantError(f"{file} does not exist: run stages/fetch.py first") from None
    return total.hexdigest()


@lru_cache(maxsize=64)
def _hash_file(file: Path, size: int, changed: int) -> bytes:
    """sha256 of a file of that size and time of change: a teacher is hashed for each split."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
