"""Describe what a teacher is made from, so that `fetch` can see whether there is anything to do."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.config import FolderTeacher, GgufTeacher, TeacherParams
from pipeline.errors import DecantError
from pipeline.hashes import hash_changed
from pipeline.hub import commit_of
from pipeline.model.folder import MODEL_FILES, TOKENIZER_FILES, files_to_copy


def teacher_made_from(
    params: TeacherParams, before: Mapping[str, Any], seen: Path | None
) -> dict[str, Any]:
    """Return what `source.json` in paths.teacher is to say: the source, and a hash of its bytes.

    Args:
        before: what it said the last time, which holds for a source that has gone since.
        seen: see `hash_changed`.

    Raises:
        DecantError: the source is not there, cannot be reached, or links out of its folder.
    """
    if params.source == "hub":
        named = {"source": "hub", "model": params.hub.id, "named": params.hub.revision}
        known = before.get("revision") if _is_of(before, named) else None
        commit = commit_of(
            params.hub.id,
            params.hub.revision,
            kind="model",
            named="teacher.hub.revision",
            otherwise=known,
        )
        return named | {"revision": commit}
    if params.source == "folder":
        named = {"source": "folder", "model": str(params.folder.path)}
        return named | {"files": _hash_folder(params.folder, before, named, seen)}
    if params.source == "wheel":
        return {"source": "wheel", "gguf_sha256": params.wheel.sha256}
    named = {"source": "gguf", "path": str(params.gguf.path)}
    return named | {"gguf_sha256": _hash_gguf(params.gguf, before, named, seen)}


def _is_of(before: Mapping[str, Any], named: Mapping[str, str]) -> bool:
    """Whether the last record is of a source of the same names."""
    return all(before.get(key) == value for key, value in named.items())


def _hash_folder(
    params: FolderTeacher,
    before: Mapping[str, Any],
    named: Mapping[str, str],
    seen: Path | None,
) -> Any:
    source = params.path
    if not source.exists() and _is_of(before, named) and "files" in before:
        return before["files"]
    if not (source / "config.json").exists():
        raise DecantError(f"teacher.folder.path={source} holds no config.json: name a model folder")
    patterns = (*MODEL_FILES, *TOKENIZER_FILES)
    for file in sorted(source.iterdir()):
        wanted = any(fnmatch(file.name, pattern) for pattern in patterns)
        if wanted and not file.exists():
            raise DecantError(f"{file} is a link to nothing: download the folder's files again")
    hashes = hash_changed(files_to_copy(source, patterns), seen)  # refuses links to outside
    return {Path(name).name: sha256 for name, sha256 in hashes.items()}


def _hash_gguf(
    params: GgufTeacher,
    before: Mapping[str, Any],
    named: Mapping[str, str],
    seen: Path | None,
) -> str:
    if params.path.exists():
        found = hash_changed([params.path], seen)[str(params.path)]
    elif _is_of(before, named) and "gguf_sha256" in before:
        found = str(before["gguf_sha256"])
    else:
        raise DecantError(f"teacher GGUF {params.path} does not exist: set teacher.gguf.path")
    if params.sha256 not in (None, found):
        raise DecantError(
            f"{params.path.name} has sha256 {found}, pinned is {params.sha256}: it is another file "
            "or damaged"
        )
    return found
