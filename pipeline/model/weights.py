"""Load and save students as Hugging Face folders: config.json, model.safetensors, tokenizer files.

Parameter names are Hugging Face's, so loading is a copy by name and a saved student opens with
`AutoModelForCausalLM`: as `qwen3` if queries and keys are normalised, else as `qwen2` if q/k/v have
a bias, else as `llama`. transformers opens the tokenizer of any `qwen2` folder as Qwen2's own,
whatever its files say. A student with a bias and another tokenizer is therefore saved as a `llama`
with `attention_bias`, whose fourth bias, that of o_proj, is zero; `attention_out_bias: false` says
so (the key that Seed-OSS uses), as it does for a `qwen3` with a bias.

The engine that runs a folder is determined by its config.json, not by a parameter: our own model if
it implements the architecture, otherwise transformers. Where both apply they agree number by number
(tests/model/test_decoder.py), so there is nothing to choose, and a user of a trained student need
not know how it was trained.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.errors import DecantError
from pipeline.io.files import require_regular_files
from pipeline.io.ownership import atomic_folder
from pipeline.model.config_json import read_config_json, stored_weights
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.model.huggingface import HuggingFaceStudent, require_layers
from pipeline.model.quantization import refuse_quantized
from pipeline.model.rope import RopeScaling, YarnScaling, read_scaling, rope_parameters
from pipeline.model.student import Student
from pipeline.model.tokenizer import TokenizerClassError, save_tokenizer

CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""The architectures of config.json that our model implements, and transformers' classes."""
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
)
_BY_NUMBER = (*_NEEDED, "num_key_value_heads", "head_dim")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
OUT_BIAS = ".self_attn.o_proj.bias"
"""Suffix of the bias that a `llama` or `qwen3` with attention_bias has and our model lacks."""
_QWEN3_HEAD_DIM = 128
"""What transformers takes for a `qwen3` without head_dim; the others have hidden_size / heads."""


class VariantError(DecantError):
    """`StudentModel` does not implement the folder's architecture; the message says why."""


def open_student(folder: Path, layers: Sequence[int] | None = None) -> Student:
    """Open the student of any Hugging Face folder in float32, with the engine that supports it.

    Args:
        layers: indices of decoder layers to keep (0-based, may not repeat); None keeps all.

    Raises:
        DecantError: neither engine can run it.
        ParamsError: `layers` names a layer that does not exist.
    """
    try:
        return load_student(folder, layers)
    except VariantError:
        return HuggingFaceStudent(folder, layers)


def read_config(folder: Path) -> ModelConfig:
    """Read the ModelConfig of a Hugging Face `qwen2`, `qwen3` or `llama` folder.

    Raises:
        VariantError: the folder uses a variant that this model does not implement; the message
            names it.
        QuantizedError: the folder's weights are quantised.
        DecantError: there is no readable config.json.
    """
    raw = read_config_json(folder)
    refuse_quantized(folder, "student, or a model that writes text,")
    kind = raw.get("model_type")
    if kind not in CLASSES:
        names = ", ".join(CLASSES)
        raise VariantError(f"{folder} holds a {kind!r} model: this student reads {names}")
    if absent := [name for name in _NEEDED if not raw.get(name)]:
        raise VariantError(
            f"{folder}/config.json lacks {absent[0]}: add it, or download the file again"
        )
    if lists := [name for name in raw if name in _BY_NUMBER and isinstance(raw[name], list)]:
        raise VariantError(f"{folder} has a {lists[0]} for each layer: the student has one for all")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta")) or 10_000.0)
    scaling = _read_rope(folder, raw, rope, theta)
    unsupported = {
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "mlp_bias": (raw.get("mlp_bias", False), False),
        "use_sliding_window": (raw.get("use_sliding_window", False), False),
    }
    bias = kind == "qwen2" or bool(raw.get("attention_bias"))
    if kind != "qwen2" and bias and raw.get("attention_out_bias") is not False:
        raise VariantError(
            f"{folder} has attention_bias=True, for o_proj too: the student supports False"
        )
    for name, (value, supported) in unsupported.items():
        if value != supported:
            raise VariantError(f"{folder} has {name}={value!r}: the student supports {supported!r}")
    config = ModelConfig(
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=_head_dim(raw),
        intermediate_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        max_seq_len=_context(raw["max_position_embeddings"], scaling),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(raw["rms_norm_eps"]),
        attention_bias=bias,
        qk_norm=kind == "qwen3",
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )
    stored = stored_weights(folder)
    if stored is not None and num_weights(config) > 2 * stored.elements:
        raise DecantError(
            f"{folder}/config.json describes {num_weights(config):,} weights, and the folder holds "
            f"{stored.elements:,}: they do not belong together, download the whole model again"
        )
    return config


def _head_dim(raw: dict[str, Any]) -> int | None:
    """Return the width of a head, or None if it is hidden_size / num_attention_heads."""
    found: int | None = raw.get("head_dim")
    if found is None and raw["model_type"] == "qwen3":
        found = _QWEN3_HEAD_DIM
    usual = found is None or found * raw["num_attention_heads"] == raw["hidden_size"]
    return None if usual else found


def num_weights(config: ModelConfig) -> int:
    """Return the number of weights in all matrices, counting a tied one once."""
    width, heads = config.hidden_size, config.num_heads + config.num_kv_heads
    layer = width * (2 * heads * config.head_size + 3 * config.intermediate_size)
    embeddings = 1 if config.tie_embeddings else 2
    return config.num_layers * layer + embeddings * config.vocab_size * width


def _read_rope(
    folder: Path, raw: dict[str, Any], rope: dict[str, Any], theta: float
) -> RopeScaling | None:
    original = raw.get("original_max_position_embeddings") or raw["max_position_embeddings"]
    try:
        scaling = read_scaling(rope, original)
    except DecantError as error:
        raise VariantError(f"{folder} has {error}") from None
    if isinstance(scaling, YarnScaling) and (theta <= 1 or not original):
        raise VariantError(
            f"{folder} has rope_theta={theta:g} and {original} original positions for rope type="
            "'yarn', which needs more than 1 and 0"
        )
    return scaling


def _context(max_position_embeddings: int, scaling: RopeScaling | None) -> int:
    """Return how many positions the model may read.

    YaRN is enabled by `rope_scaling` alone (Qwen2.5's README); max_position_embeddings then still
    gives the training context.
    """
    if not isinstance(scaling, YarnScaling):
        return max_position_embeddings
    stretched = scaling.factor * scaling.original_max_position_embeddings
    return max(max_position_embeddings, round(stretched))


class _SkipInit(TorchFunctionMode):
    """Within the block, torch.nn.init leaves random weights as they were allocated.

    All of them are read from a file next. Initialising them took longer than reading them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_student(folder: Path, layers: Sequence[int] | None = None) -> StudentModel:
    """Load the student of a Hugging Face folder in float32, or only some of its layers, in order.

    Args:
        folder: config.json and *.safetensors, ours or Hugging Face's.
        layers: indices of decoder layers to keep (0-based, may not repeat); None keeps all.
    """
    config = read_config(folder)
    if layers is not None:
        require_layers(layers, config.num_layers, folder)
        config = ModelConfig(**{**vars(config), "num_layers": len(layers)})
    with _SkipInit():
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
            if name.endswith(".rotary_emb.inv_freq"):  # Llama 2 stores it; config.json gives it too
                continue
            if name.endswith(OUT_BIAS) and not tensor.any():  # see the module docstring
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
    """Write a Hugging Face folder atomically: `folder` is either complete or does not exist.

    Raises:
        DecantError: the tokenizer cannot be read, or transformers would open it as another
            tokenizer than its tokenizer.json describes.
    """
    with atomic_folder(folder, "model", key="paths.runs") as partial:
        if isinstance(student, HuggingFaceStudent):
            student.model.save_pretrained(partial)
            if tokenizer_from is not None:
                save_tokenizer(tokenizer_from, partial)
        elif isinstance(student, StudentModel):
            _write_model(student, partial, tokenizer_from)


def require_saveable(student: Student, tokenizer_from: Path) -> None:
    """Refuse, before training, a student that `save_student` would refuse after it.

    Raises:
        DecantError: see `save_student`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(student, HuggingFaceStudent):
            student.model.config.save_pretrained(scratch)
            save_tokenizer(tokenizer_from, Path(scratch))
        elif isinstance(student, StudentModel):
            _write_config_and_tokenizer(student.config, Path(scratch), tokenizer_from)


def _write_model(student: StudentModel, folder: Path, tokenizer_from: Path | None) -> None:
    kind = _write_config_and_tokenizer(student.config, folder, tokenizer_from)
    tensors = {
        name: parameter.detach().to("cpu").contiguous()
        for name, parameter in student.named_parameters()
    }
    if kind != "qwen2" and student.config.attention_bias:
        for number in range(student.config.num_layers):
            zeros = torch.zeros(student.config.hidden_size)
            tensors[f"model.layers.{number}{OUT_BIAS}"] = zeros
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_config_and_tokenizer(
    config: ModelConfig, folder: Path, tokenizer_from: Path | None
) -> str:
    """Try each model_type that has these weights; return the first that keeps the tokenizer."""
    kinds = ["qwen2", "llama"] if config.attention_bias else ["llama"]
    if config.qk_norm:
        kinds = ["qwen3"]
    for kind in kinds:
        text = json.dumps(_hugging_face_config(config, kind), indent=2)
        (folder / "config.json").write_text(text + "\n")
        if tokenizer_from is None:
            return kind
        try:
            save_tokenizer(tokenizer_from, folder)
        except TokenizerClassError:
            if kind == kinds[-1]:
                raise
        else:
            return kind
    raise AssertionError


def stream_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a model folder by name, as stored, with one in memory at a time.

    Raises:
        DecantError: there is no *.safetensors file, or one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    require_regular_files(files)
    if not files:
        raise DecantError(f"{folder} holds no *.safetensors: is it a model folder?")
    with ExitStack() as stack:
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise DecantError(
                    f"{file} is damaged ({error}): download the folder's files again"
                ) from None
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                yield name, opened.get_tensor(name)


def _hugging_face_config(config: ModelConfig, kind: str) -> dict[str, Any]:
    biases = {"attention_bias": True, "attention_out_bias": False}
    head_dim = {"head_dim": config.head_size}
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        **(head_dim if kind == "qwen3" or config.head_dim is not None else {}),
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope_parameters(config.rope_theta, config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        **(biases if kind != "qwen2" and config.attention_bias else {}),
    }
