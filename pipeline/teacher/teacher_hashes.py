"""Describe what a teacher is made from, so that `fetch` can see whether there is anything to do."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.config.source_params import GgufTeacher, TeacherParams
from pipeline.errors import DecantError
from pipeline.io.hashes import hash_changed, require_sha256
from pipeline.io.hub import commit_of
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
    named: dict[str, str] = {"source": params.source}
    if params.source == "hub":
        named |= {"model": params.hub.id, "named": params.hub.revision}
    elif params.source == "folder":
        named |= {"model": str(params.folder.path)}
    elif params.source == "gguf":
        named |= {"path": str(params.gguf.path)}
    known = before if named.items() <= before.items() else {}  # of a source of the same names
    if params.source == "hub":
        commit = commit_of(
            params.hub.id,
            params.hub.revision,
            kind="model",
            named="teacher.hub.revision",
            otherwise=known.get("revision"),
        )
        return named | {"revision": commit}
    if params.source == "folder":
        return named | {"files": _hash_folder(params.folder.path, known.get("files"), seen)}
    if params.source == "gguf":
        return named | {"gguf_sha256": _hash_gguf(params.gguf, known.get("gguf_sha256"), seen)}
    return named | {"gguf_sha256": params.wheel.sha256}


def _hash_folder(source: Path, known: Any, seen: Path | None) -> Any:
    if known is not None and not source.exists():
        return known
    if not (source / "config.json").exists():
        raise DecantError(f"teacher.folder.path={source} holds no config.json: name a model folder")
    patterns = (*MODEL_FILES, *TOKENIZER_FILES)
    for file in sorted(source.iterdir()):
        wanted = any(fnmatch(file.name, pattern) for pattern in patterns)
        if wanted and not file.exists():
            raise DecantError(f"{file} is a dangling link: download the folder's files again")
    hashes = hash_changed(files_to_copy(source, patterns), seen)  # refuses links to outside
    return {Path(name).name: sha256 for name, sha256 in hashes.items()}


def _hash_gguf(params: GgufTeacher, known: str | None, seen: Path | None) -> str:
    if params.path.exists():
        known = hash_changed([params.path], seen)[str(params.path)]
    if known is None:
        raise DecantError(f"teacher GGUF {params.path} does not exist: set teacher.gguf.path")
    require_sha256(params.path, known, params.sha256)
    return known
