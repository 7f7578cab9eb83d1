"""Load and save students as Hugging Face folders: config.json, model.safetensors, tokenizer files.

Parameter names are Hugging Face's, so loading is a copy by name and a saved student opens with
`AutoModelForCausalLM` (as `qwen2` when q/k/v carry a bias, as `llama` when not).

Which engine runs a folder follows from its config.json, not from a parameter: our own model where
it implements that architecture, transformers for all others. The two agree number by number where
both apply (tests/model/test_student.py), so there is nothing to choose, and whoever opens a trained
student need not know how it was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import DecantError
from pipeline.model.base import Student
from pipeline.model.folder import TOKENIZER_FILES, copy_files
from pipeline.model.hugging_face import HuggingFaceStudent, require_layers
from pipeline.model.rope import RopeScaling, YarnScaling, read_scaling, rope_parameters
from pipeline.model.student import ModelConfig, StudentModel
from pipeline.storage import atomic_folder

_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
)
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


class VariantError(DecantError):
    """The folder's architecture is not one that `StudentModel` implements; the message names it."""


def open_student(folder: Path, layers: Sequence[int] | None = None) -> Student:
    """The student of any Hugging Face folder in float32, run by the engine that fits.

    Args:
        layers: indices of decoder layers to keep (0-based, may not repeat); None keeps all.

    Raises:
        DecantError: neither engine can run it.
        ParamsError: `layers` names what is not there.
    """
    try:
        return load_student(folder, layers)
    except VariantError:
        return HuggingFaceStudent(folder, layers)


def read_config(folder: Path) -> ModelConfig:
    """ModelConfig of a Hugging Face `qwen2` or `llama` folder.

    Raises:
        VariantError: a variant this model does not implement, named.
        DecantError: no readable config.json.
    """
    raw = _read_json(folder / "config.json")
    kind = raw.get("model_type")
    if kind not in ("qwen2", "llama"):
        raise VariantError(f"{folder} holds a {kind!r} model: this student reads qwen2 and llama")
    if absent := [name for name in _NEEDED if not raw.get(name)]:
        raise VariantError(
            f"{folder}/config.json lacks {absent[0]}: add it, or bring the file again"
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    scaling = _read_rope(folder, raw, rope)
    head_size = raw["hidden_size"] // raw["num_attention_heads"]
    unsupported = {
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "head_dim": (raw.get("head_dim") or head_size, head_size),
        "mlp_bias": (raw.get("mlp_bias", False), False),
        "use_sliding_window": (raw.get("use_sliding_window", False), False),
        "attention_bias": (kind == "llama" and raw.get("attention_bias", False), False),
    }
    for name, (value, supported) in unsupported.items():
        if value != supported:
            raise VariantError(f"{folder} has {name}={value!r}: the student supports {supported!r}")
    return ModelConfig(
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        intermediate_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        max_seq_len=_context(raw["max_position_embeddings"], scaling),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        rope_scaling=scaling,
        norm_eps=raw["rms_norm_eps"],
        attention_bias=kind == "qwen2",
        tie_embeddings=raw.get("tie_word_embeddings", False),
    )


def _read_rope(folder: Path, raw: dict[str, Any], rope: dict[str, Any]) -> RopeScaling | None:
    original = raw.get("original_max_position_embeddings") or raw["max_position_embeddings"]
    try:
        return read_scaling(rope, original)
    except DecantError as error:
        raise VariantError(f"{folder} has {error}") from None


def _context(max_position_embeddings: int, scaling: RopeScaling | None) -> int:
    """Positions a model may read: YaRN is switched on by `rope_scaling` alone (Qwen2.5's README).

    Its config.json then still tells the context it was trained on.
    """
    if not isinstance(scaling, YarnScaling):
        return max_position_embeddings
    stretched = scaling.factor * scaling.original_max_position_embeddings
    return max(max_position_embeddings, round(stretched))


def load_student(folder: Path, layers: Sequence[int] | None = None) -> StudentModel:
    """The student of a Hugging Face folder in float32, or only the given layers of it, in order.

    Args:
        folder: config.json and *.safetensors, ours or Hugging Face's.
        layers: indices of decoder layers to keep (0-based, may not repeat); None keeps all.
    """
    config = read_config(folder)
    if layers is not None:
        require_layers(layers, config.num_layers, folder)
        config = ModelConfig(**{**vars(config), "num_layers": len(layers)})
    student = StudentModel(config)
    position = {source: i for i, source in enumerate(layers or range(config.num_layers))}
    targets = dict(student.named_parameters())
    loaded: set[str] = set()
    with torch.no_grad():
        for name, tensor in stream_tensors(folder):
            match = _LAYER.match(name)
            if match:
                if int(match[1]) not in position:
                    continue
                name = f"model.layers.{position[int(match[1])]}.{match[2]}"
            if name == "lm_head.weight" and config.tie_embeddings:
                continue
            if name.endswith(".rotary_emb.inv_freq"):  # Llama 2 stores what config.json gives
                continue
            if name not in targets or targets[name].shape != tensor.shape:
                raise DecantError(
                    f"{folder} holds {name} {tuple(tensor.shape)}, which its config.json does not "
                    "describe: the folder is damaged or of another architecture"
                )
            targets[name].copy_(tensor)
            loaded.add(name)
    if missing := targets.keys() - loaded:
        raise DecantError(f"{folder} lacks {len(missing)} tensors, for example {min(missing)}")
    return student


def save_student(student: Student, folder: Path, *, tokenizer_from: Path | None) -> None:
    """Write a Hugging Face folder atomically: complete under `folder`, or not there at all."""
    with atomic_folder(folder, "model", key="paths.runs") as partial:
        if isinstance(student, HuggingFaceStudent):
            student.model.save_pretrained(partial)
        elif isinstance(student, StudentModel):
            _write_model(student, partial)
        if tokenizer_from is not None:
            copy_files(tokenizer_from, TOKENIZER_FILES, partial)


def _write_model(student: StudentModel, folder: Path) -> None:
    tensors = {
        name: parameter.detach().to("cpu").contiguous()
        for name, parameter in student.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(_hugging_face_config(student.config), indent=2)
    (folder / "config.json").write_text(text + "\n")


def stream_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model folder by name, as stored, one in memory at a time.

    Raises:
        DecantError: no *.safetensors, or a damaged one.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DecantError(f"{folder} holds no *.safetensors: is it a model folder?")
    with ExitStack() as stack:
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise DecantError(
                    f"{file} is damaged ({error}): bring the folder's files again"
                ) from None
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                yield name, opened.get_tensor(name)


def _hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    kind = "qwen2" if config.attention_bias else "llama"
    return {
        "architectures": ["Qwen2ForCausalLM" if kind == "qwen2" else "LlamaForCausalLM"],
        "model_type": kind,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope_parameters(config.rope_theta, config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DecantError(
            f"{file} cannot be read as a model's config.json ({error}): bring the whole model again"
        ) from None
    if not isinstance(content, dict):
        raise DecantError(f"{file} must hold a JSON object: bring the folder's files again")
    return content
