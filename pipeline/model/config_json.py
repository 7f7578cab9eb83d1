"""Read config.json of a model folder and check it before anything is built from it.

Model classes trust their config. A size that is text, or a thousand times too large for the
weights, would end in a traceback from another library, in an allocation that no machine can make,
or in a loop over ten million layers. So each size is compared with the folder's weights (only their
headers are read) before PyTorch, transformers or the GGUF writer see it. Missing keys are left to
the reader, because the keys that a model needs depend on its architecture.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.errors import DecantError, reason_of
from pipeline.io.files import require_regular_files
from pipeline.runtime.optional import import_transformers

_LARGEST_FILE = 2**24  # bytes; config.json files usually have some thousands
_DEEPEST = 16  # levels of nesting; three are usual
_LARGEST_INT = 2**31 - 1
_LARGEST_FLOAT = 3.4e38  # largest float32, the type that models and GGUF files store

_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_VOCABULARY = ("vocab_size",)
_BESIDE_HIDDEN = (  # the other dimension of a matrix that has hidden_size as one
    "intermediate_size",
    "moe_intermediate_size",
    "n_inner",
    "ffn_dim",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim")
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "original_max_position_embeddings",
)
_SIZES = (*_HIDDEN, *_LAYERS, *_VOCABULARY, *_BESIDE_HIDDEN, *_HEADS, *_POSITIONS)
_LAYERS_OF_OTHER_PARTS = 256
_UNUSED = 2**24
"""Weights of a matrix that a config describes but no layer has (a model with only sparse layers
keeps the default width of a dense one).
"""
_BY_LAYER = ("intermediate_size", *_HEADS)  # may be lists with one value per layer
_AT_LEAST_ONE = (*_HIDDEN, *_LAYERS, *_VOCABULARY, "num_attention_heads", "n_head", "n_heads")
_FLOATS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_eps",
    "rope_theta",
    "initializer_range",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
_BOOLEANS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "truncate")
_TEXTS = ("model_type", "rope_type", "hidden_act", "hidden_activation", "activation_function")
_OBJECTS = ("rope_parameters", "rope_scaling", "text_config", "quantization_config")

_PACKED = ("U8", "I8", "I32")  # quantised formats pack up to 8 weights into one of these numbers
_NUMBERED = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class StoredWeights:
    """Sizes read from the headers of a folder's *.safetensors.

    Attributes:
        elements: upper bound on the number of weights in all tensors.
        layers: upper bound on the number of numbered modules: one more than the largest number in
            a tensor's name.
    """

    elements: int
    layers: int


def read_config_json(folder: Path) -> dict[str, Any]:
    """Read a model folder's config.json; check that sizes have the right types and fit the weights.

    Raises:
        DecantError: it cannot be read, a value has another type, or a size exceeds the weights.
    """
    file = folder / "config.json"
    content = read_config_file(file)
    stored = stored_weights(folder)
    for path, values in _objects(content, file):
        _require_fit(values, stored, file, path)
    return content


def read_config_file(file: Path) -> dict[str, Any]:
    """Read a config.json without its weights; check the types and signs of known values.

    Raises:
        DecantError: it cannot be read, or a value has another type or sign.
    """
    require_regular_files([file])
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise DecantError(
                f"{file} has {file.stat().st_size:,} bytes, more than the {_LARGEST_FILE:,} that a "
                "config.json may have: use the model's original file"
            )
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DecantError):
            raise
        reason = reason_of(error)
        raise DecantError(
            f"{file} cannot be read as a model's config.json ({reason}): download the whole model "
            "again"
        ) from None
    if not isinstance(content, dict):
        raise DecantError(f"{file} must hold a JSON object: download the folder's files again")
    for path, values in _objects(content, file):
        _require_types(values, file, path)
    return content


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a larger model's config.json, or all of it."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def quantization_config(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return the method that quantised the weights of a config.json, and its settings; or None.

    A larger model's config.json may hold them in the language model's part. bitsandbytes left out
    the method's name at first.
    """
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    if not found:
        return None
    bits = [number for number in (8, 4) if found.get(f"load_in_{number}bit")]
    usual = "bitsandbytes" if bits else "an unnamed method"
    return str(found.get("quant_method") or usual), found


def embedding_rows(folder: Path) -> int | None:
    """Return the number of embedding rows in config.json, or None if it does not give one.

    Raises:
        DecantError: see `read_config_json`.
    """
    if not (folder / "config.json").exists():
        return None
    rows: int | None = _first(text_config(read_config_json(folder)), _VOCABULARY)
    return rows


def describe(folder: Path) -> str:
    """Describe a model folder in one line: type, layers, width, vocabulary and size.

    A number that config.json omits is the default of the architecture's own class.

    Raises:
        DecantError: see `read_config_json`.
    """
    raw = read_config_json(folder)
    inner: Mapping[str, Any] = text_config(raw)
    keys = (_LAYERS, _HIDDEN, _VOCABULARY)
    if any(_first(inner, names) is None for names in keys):
        inner = _with_defaults(folder) or inner
    layers, hidden, rows = (_first(inner, names) for names in keys)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    parts = [str(raw.get("model_type", "a model of an unnamed type"))]
    if layers is not None:
        parts.append(f"{layers} layers")
    if hidden is not None:
        parts.append(f"hidden {hidden}")
    if rows is not None:
        parts.append(f"{rows:,} vocabulary rows")
    return ", ".join([*parts, f"{size / 1e6:,.0f} MB"])


def stored_weights(folder: Path) -> StoredWeights | None:
    """Read sizes from the headers of *.safetensors; return None if there is no such file.

    Raises:
        DecantError: a file is damaged or is not a regular file.
    """
    files = sorted(folder.glob("*.safetensors"))
    require_regular_files(files)
    elements = layers = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    tensor = opened.get_slice(name)
                    weights = 8 if tensor.get_dtype() in _PACKED else 1
                    elements += weights * math.prod(tensor.get_shape())
                    numbers = [int(number) for number in _NUMBERED.findall(name)]
                    layers = max(layers, 1 + max(numbers, default=0))
        except (SafetensorError, OSError) as error:
            reason = reason_of(error)
            raise DecantError(
                f"{file} is damaged ({reason}): download the folder's files again"
            ) from None
    return StoredWeights(elements, layers) if files else None


def load_config(folder: Path) -> Any:
    """Return the config of a local folder as transformers' class; no code from it is run."""
    return import_transformers().AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )


def _with_defaults(folder: Path) -> Mapping[str, Any] | None:
    """Return the language model's config with its class's defaults; None for an unknown class."""
    try:
        inner = load_config(folder).get_text_config(decoder=True)
        return {names[0]: getattr(inner, names[0], None) for names in (_LAYERS, _HIDDEN)} | {
            "vocab_size": getattr(inner, "vocab_size", None)
        }
    except Exception:  # config classes fail in many ways on foreign values
        return None


def _objects(config: dict[str, Any], file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield all objects within a config, with the path to each, without recursion."""
    waiting: list[tuple[str, int, Any]] = [("", 0, config)]
    while waiting:
        path, depth, value = waiting.pop()
        if depth > _DEEPEST:
            raise DecantError(
                f"{file} is nested deeper than {_DEEPEST} levels: use the model's original "
                "config.json"
            )
        if isinstance(value, dict):
            yield path, value
            waiting += [(f"{path}{name}.", depth + 1, inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(path, depth + 1, inner) for inner in value]


def require_sizes(values: Mapping[str, Any], stored: StoredWeights, file: Path) -> None:
    """Refuse sizes, named as in config.json, with a wrong type or beyond the weights of a file.

    Raises:
        DecantError: it names the first such size.
    """
    _require_types(values, file, "")
    _require_fit(values, stored, file, "")


def _require_types(values: Mapping[str, Any], file: Path, path: str) -> None:
    wanted = (
        (_BOOLEANS, bool, "true or false"),
        (_TEXTS, str, "text"),
        (_OBJECTS, dict, "an object"),
    )
    for names, kind, word in wanted:
        for name in names:
            if not isinstance(values.get(name), (kind, type(None))):
                raise _wrong(file, path + name, values[name], word)
    for name in _SIZES:
        least = 1 if name in _AT_LEAST_ONE else 0
        for value in _listed(values.get(name), name):
            if type(value) is not int or not least <= value <= _LARGEST_INT:
                word = f"a whole number from {least} to {_LARGEST_INT:,}"
                raise _wrong(file, path + name, value, word)
    for name in _FLOATS:
        value = values.get(name, 0)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value <= _LARGEST_FLOAT):
            raise _wrong(file, path + name, value, f"a number from 0 to {_LARGEST_FLOAT:g}")


def _require_fit(
    values: Mapping[str, Any], stored: StoredWeights | None, file: Path, path: str
) -> None:
    """Refuse sizes that the stored weights cannot have."""
    if stored is None:
        return
    hidden = _first(values, _HIDDEN) or 1
    layers = stored.layers
    if path not in ("", "text_config."):  # a part that the folder need not contain
        layers = max(layers, _LAYERS_OF_OTHER_PARTS)
    bounds = (
        (_LAYERS, layers, f"numbers {layers:,} at most in its tensors' names"),
        ((*_HIDDEN, *_HEADS), stored.elements, f"has {stored.elements:,} weights"),
        (_VOCABULARY, stored.elements // hidden, f"has {stored.elements:,} weights"),
        (
            _BESIDE_HIDDEN,
            (stored.elements + _UNUSED) // hidden,
            f"has {stored.elements:,} weights",
        ),
    )
    for names, most, has in bounds:
        for name in names:
            for value in _listed(values.get(name), name):
                if value > most:
                    raise DecantError(
                        f"{file} says {path}{name}={value:,}, and the model {has}: sizes and "
                        "weights do not belong together, download the whole model again"
                    )


def _wrong(file: Path, name: str, value: Any, wanted: str) -> DecantError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return DecantError(
        f"{file} says {name}={shown}, which must be {wanted}: use the model's original config.json"
    )


def _listed(value: Any, name: str) -> list[Any]:
    """Return the value as a list, one per layer if the key allows that; empty for null."""
    if value is None:
        return []
    return value if isinstance(value, list) and name in _BY_LAYER else [value]


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)
