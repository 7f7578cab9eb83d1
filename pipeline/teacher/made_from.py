"""Describe what a teacher is made from, so that `fetch` can see whether there is anything to do."""

from __future__ import annotations

from collections.abc import Mapping
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
        known = before.get("revision") if before.get("model") == params.hub.id else None
        commit = commit_of(
            params.hub.id,
            params.hub.revision,
            kind="model",
            named="teacher.hub.revision",
            otherwise=known,
        )
        return {"source": "hub", "model": params.hub.id, "revision": commit}
    if params.source == "folder":
        files = _hash_folder(params.folder, before, seen)
        return {"source": "folder", "model": str(params.folder.path), "files": files}
    sha256 = params.wheel.sha256
    if params.source == "gguf":
        sha256 = _hash_gguf(params.gguf, before, seen)
    return {"source": params.source, "gguf_sha256": sha256}


def _hash_folder(params: FolderTeacher, before: Mapping[str, Any], seen: Path | None) -> Any:
    source = params.path
    if not source.exists() and before.get("model") == str(source):
        return before["files"]
    if not (source / "config.json").exists():
        raise DecantError(f"teacher.folder.path={source} holds no config.json: name a model folder")
    files = files_to_copy(source, (*MODEL_FILES, *TOKENIZER_FILES))  # refuses links out of it
    hashes = hash_changed(files, seen)
    return {Path(name).name: sha256 for name, sha256 in hashes.items()}


def _hash_gguf(params: GgufTeacher, before: Mapping[str, Any], seen: Path | None) -> str:
    if params.path.exists():
        return hash_changed([params.path], seen)[str(params.path)]
    if before.get("source") != "gguf":
        raise DecantError(f"teacher GGUF {params.path} does not exist: set teacher.gguf.path")
    return str(before["gguf_sha256"])
