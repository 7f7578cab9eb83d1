"""Hugging Face model folders: their place, files and hashes, without opening the model.

If the teacher already is a folder, the user's own or one in the hub's cache, it is used in place.
Instead of copying the weights, stages/fetch.py then writes a pointer, `source.json`, to
paths.teacher. DVC tracks this pointer too: it holds the hash of every file, or the commit on the
hub.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import DecantError
from pipeline.io.files import require_regular_files
from pipeline.io.hashes import hash_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)

_OPENED = (".json", ".safetensors", ".jinja", ".txt", ".model")
"""Suffixes of the files that transformers opens in a folder."""


def require_regular_folder(folder: Path) -> None:
    """Apply `require_regular_files` to every file that a library may open in a model folder.

    Raises:
        DecantError: see `require_regular_files`.
    """
    if folder.is_dir():
        require_regular_files(f for f in sorted(folder.iterdir()) if f.suffix in _OPENED)


MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors*")

_IN_DVC = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")
"""How the path of a file in DVC's cache ends."""

POINTER = "source.json"
"""File in paths.teacher: the source that `fetch` used, and where the model is if not beside it."""


def teacher_folder(folder: Path) -> Path:
    """Return the teacher's Hugging Face folder: paths.teacher, or the folder it points to.

    The folder may be absent, since a cached run allows that; then it holds no config.json.
    """
    pointer = read_pointer(folder)
    if (folder / "config.json").exists() or "model" not in pointer:
        return folder
    if pointer["source"] == "folder":
        return Path(pointer["model"])
    return hub_snapshot(pointer["model"], pointer["revision"]) or folder


def read_pointer(folder: Path) -> dict[str, Any]:
    """Read `source.json` in paths.teacher; return an empty dict if there is none.

    Raises:
        DecantError: the file is damaged.
    """
    try:
        said = json.loads((folder / POINTER).read_text())
        if said["source"] == "hub":
            names = {key: str(said[key]) for key in ("source", "model", "revision")}
            return names | {"named": str(said.get("named"))}
        return {"source": str(said["source"]), **said}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise DecantError(
            f"{folder / POINTER} is damaged: remove {folder} and run stages/fetch.py again"
        ) from None


def hub_snapshot(hub_id: str, revision: str) -> Path | None:
    """Return a model's folder in the hub's local cache, or None if it is missing or incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=[*MODEL_FILES, *TOKENIZER_FILES],
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    return Path(folder)


def copy_files(source: Path, patterns: Iterable[str], target: Path) -> None:
    """Copy files of a model folder, by names or patterns, to another folder; skip absent ones.

    Raises:
        DecantError: see `files_to_copy`.
    """
    for file in files_to_copy(source, patterns):
        shutil.copyfile(file, target / file.name)


def files_to_copy(source: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files of a model folder, by names or patterns, all of which may be copied.

    A link that leads out of the folder is refused: a stranger's folder could have a private file
    copied, and published with the model, by linking to it. Two caches are followed: the hub's own,
    whose snapshots link to the files beside them, and DVC's, whose files are named by their hash.

    Raises:
        DecantError: it names the link, or the file that is not a regular file.
    """
    inside = [source.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    files = sorted(file for pattern in patterns for file in source.glob(pattern))
    require_regular_files(files)
    for file in files:
        whole = file.resolve()
        in_dvc = _IN_DVC.search(whole.as_posix()) is not None
        if not (in_dvc or any(whole.is_relative_to(folder) for folder in inside)):
            raise DecantError(
                f"{file} is a link to {whole}, outside of its folder, and is not followed: put the "
                "file itself there if it belongs to the model"
            )
    return files


def hash_weights(folder: Path) -> str:
    """Return the sha256 of a model folder's config.json and all *.safetensors, in name order."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if len(files) == 1:
        raise DecantError(
            f"{folder} holds no *.safetensors: run stages/fetch.py for a teacher, or name a folder "
            "that holds a model"
        )
    return _hash_files(files)


def hash_tokenizer(folder: Path) -> str:
    """Return the sha256 of tokenizer.json: vocabulary, merges, splitting and normalisation."""
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
    """Return a file's sha256, cached by size and mtime, since each split hashes the teacher."""
    return bytes.fromhex(hash_file(file))
