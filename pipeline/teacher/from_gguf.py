"""A GGUF file as a teacher: dequantised to a Hugging Face folder, or refused for its content.

transformers reads weights, sizes and vocabulary of a GGUF file, but not how positions are scaled,
nor (for some tokenizers) how text is split; both are read from the file here. Anything that
config.json cannot express is refused by name, because a teacher that is slightly wrong gives a
student that is slightly wrong.

This module first reads the header within the file's bounds: libraries trust its counts and lengths,
and a single flipped byte could lead to a huge allocation.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DecantError, is_library_error, reason_of
from pipeline.io.files import require_regular_files
from pipeline.io.hashes import hash_file, require_sha256
from pipeline.model.config_json import StoredWeights, require_sizes
from pipeline.model.rope import Llama3Scaling, inverse_frequencies
from pipeline.runtime.console import say
from pipeline.runtime.optional import import_transformers, require
from pipeline.teacher.front_matter import write_gguf_card

_EVERY_DIGIT = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""`tokenizer.ggml.pre` values that mean "each digit alone, then GPT-2's pattern"."""
_AS_GPT2 = {"gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "mpt", "olmo"}
_UNKNOWN_PRE = (None, "", "default")  # files written before llama.cpp recorded it

_WIDTHS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_FLOAT32 = 0
_SIZES = {  # GGUF's key below the architecture's name -> config.json's
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_count": "num_experts",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.scaling.factor": "factor",
}
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_INSTEAD = "set teacher.source to hub or folder, and use the model's safetensors"


@dataclass(frozen=True)
class _Stored:
    """Location of a tensor in the file."""

    shape: tuple[int, ...]  # fastest dimension first
    format: int
    start: int  # byte offset in the file


@dataclass(frozen=True)
class Header:
    """The content of a GGUF file before its weights; of an array, only its length."""

    metadata: dict[str, Any]
    tensors: dict[str, _Stored]

    def of_architecture(self, key: str) -> Any:
        """Return the value of a key under the architecture's name; None if there is none."""
        return self.metadata.get(f"{self.metadata['general.architecture']}.{key}")


def dequantise(file: Path, sha256: str | None, folder: Path) -> None:
    """Write a GGUF file as float32 safetensors with config and tokenizer, into an existing folder.

    Args:
        sha256: hash that the file must have; None accepts any.

    Raises:
        DecantError: the file does not exist, has another hash, is damaged, or contains something
            that a Hugging Face folder cannot express.
    """
    gguf = require("gguf", "gguf", "a GGUF teacher")
    if not file.exists():
        raise DecantError(f"teacher GGUF {file} does not exist: set teacher.gguf.path")
    require_regular_files([file])
    if sha256 is not None:
        require_sha256(file, hash_file(file), sha256)
    try:
        header = read_header(file, gguf.GGML_QUANT_SIZES)
        _require_sizes(header, file)
        rope = _rope_scaling(header, file)
        model, tokenizer = _open(header, file)
        _split_as_said(tokenizer, header, file)
        if rope is not None:
            _scale_positions(model.config, rope, file)
        _require_finite(model, file)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_gguf_card(header.metadata, folder)
    except BaseException as error:  # damage can raise errors of several libraries
        if isinstance(error, DecantError) or not is_library_error(error):
            raise
        reason = reason_of(error)
        raise DecantError(
            f"{file} cannot be read as a GGUF model ({reason}): download the file again, or "
            f"{_INSTEAD}"
        ) from error


def read_header(file: Path, block_sizes: Any) -> Header:
    """Read metadata and the table of tensors, and require that all tensors lie within the file.

    Args:
        block_sizes: format -> weights and bytes per block (gguf.GGML_QUANT_SIZES).

    Raises:
        DecantError: the file does not begin like a GGUF file, or a count or an offset leads out of
            it.
    """
    sizes = {int(kind): size for kind, size in block_sizes.items()}
    with file.open("rb") as stream:
        if file.stat().st_size < 24:
            raise _damaged(file, f"has {file.stat().st_size} bytes")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(data, file).header(sizes)


class _Walk:
    """Reader of a header from its start; `_room` refuses what would lie beyond the file's end."""

    def __init__(self, data: mmap.mmap, file: Path) -> None:
        self._data = data
        self._file = file
        self._place = 0

    def header(self, sizes: dict[int, tuple[int, int]]) -> Header:
        if self._data[:4] != b"GGUF":
            raise _damaged(self._file, "does not begin with GGUF")
        self._place = 4
        version, num_tensors, num_values = self._numbers("IQQ")
        if version not in (2, 3):
            raise _damaged(self._file, f"is of version {version}, and 2 and 3 are read")
        self._room(num_tensors * 24 + num_values * 13)  # the minimum size of each
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            metadata[key] = self._value(*self._numbers("I"))
        table = [self._tensor() for _ in range(num_tensors)]
        if not isinstance(metadata.get("general.architecture"), str):
            raise _damaged(self._file, "names no architecture")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise _damaged(self._file, f"aligns its weights to {alignment!r} bytes")
        start = -(-self._place // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in table:
            if kind not in sizes:
                raise _damaged(self._file, f"holds {name} in the unknown format {kind}")
            weights, num_bytes = sizes[kind]
            self._place = start + offset
            self._room(-(-math.prod(shape) // weights) * num_bytes)
            tensors[name] = _Stored(shape, kind, self._place)
        return Header(metadata, tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (num_dimensions,) = self._numbers("I")
        if num_dimensions > 4:
            raise _damaged(self._file, f"gives {name[:80]!r} {num_dimensions:,} dimensions")
        shape = self._numbers(f"{num_dimensions}Q")
        kind, offset = self._numbers("IQ")
        return name, shape, kind, offset

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _WIDTHS:
            return self._numbers(_WIDTHS[kind])[0]
        if kind != _ARRAY:
            raise _damaged(self._file, f"holds a value of the unknown type {kind}")
        inner, count = self._numbers("IQ")
        if inner == _STRING:
            self._room(8 * count)
            for _ in range(count):
                self._skip(*self._numbers("Q"))
        elif inner in _WIDTHS:
            self._skip(count * struct.calcsize(f"<{_WIDTHS[inner]}"))
        else:
            raise _damaged(self._file, f"holds an array of the unknown type {inner}")
        return _Array(count)

    def _string(self) -> str:
        (length,) = self._numbers("Q")
        self._room(length)
        text = self._data[self._place : self._place + length].decode()
        self._place += length
        return text

    def _numbers(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        self._room(struct.calcsize(form))
        values = struct.unpack_from(form, self._data, self._place)
        self._place += struct.calcsize(form)
        return values

    def _skip(self, num_bytes: int) -> None:
        self._room(num_bytes)
        self._place += num_bytes

    def _room(self, num_bytes: int) -> None:
        if num_bytes > len(self._data) - self._place:
            raise _damaged(
                self._file,
                f"claims {num_bytes:,} bytes at {self._place:,}, beyond its {len(self._data):,}",
            )


@dataclass(frozen=True)
class _Array:
    """An array in the metadata, of which only the length is kept."""

    length: int


def _require_sizes(header: Header, file: Path) -> None:
    """Refuse sizes that do not fit the file's weights."""
    values: dict[str, Any] = {}
    for key, name in _SIZES.items():
        value = header.of_architecture(key)
        if value is not None and not isinstance(value, _Array):
            values.setdefault(name, value)
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, _Array):
        values.setdefault("vocab_size", tokens.length)
    elements = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    numbers = (int(match[1]) for name in header.tensors if (match := _BLOCK.match(name)))
    require_sizes(values, StoredWeights(elements, 1 + max(numbers, default=-1)), file)


def _open(header: Header, file: Path) -> tuple[Any, Any]:
    """Open the model, in float32, and the tokenizer, as transformers reads them.

    transformers does not read the width of a Qwen3's heads, and would take 128.
    """
    transformers = import_transformers()
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    unread = {}
    if header.metadata["general.architecture"] == "qwen3":
        usual = header.of_architecture("embedding_length")
        usual //= header.of_architecture("attention.head_count")
        unread["head_dim"] = header.of_architecture("attention.key_length") or usual
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
        **where,
        **unread,
    )
    return model, transformers.AutoTokenizer.from_pretrained(file.parent, **where)


def _split_as_said(tokenizer: Any, header: Header, file: Path) -> None:
    """Make a byte-level tokenizer split text as `tokenizer.ggml.pre` says.

    transformers knows some of llama.cpp's names and uses GPT-2's pattern for all others.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    pre = header.metadata.get("tokenizer.ggml.pre")
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    backend = tokenizer.backend_tokenizer
    if pre in _EVERY_DIGIT:
        backend.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    elif pre in _UNKNOWN_PRE:
        say(
            f"fetch: {file.name} does not say how its tokenizer splits text (tokenizer.ggml.pre); "
            "GPT-2's pattern is assumed, so numbers and code may become other tokens than the "
            f"model was trained on: to be sure, {_INSTEAD}"
        )
    elif pre not in _AS_GPT2 and isinstance(backend.pre_tokenizer, ByteLevel):
        raise DecantError(
            f"{file} has a tokenizer that splits text by {pre!r} (tokenizer.ggml.pre), which "
            f"Decant does not know: {_INSTEAD}"
        )


def _rope_scaling(header: Header, file: Path) -> dict[str, Any] | None:
    """Return the file's position scaling as `rope_parameters` without rope_theta; None if unscaled.

    Raises:
        DecantError: config.json cannot express the file's scaling.
    """
    architecture = header.metadata["general.architecture"]
    prefix = f"{architecture}.rope.scaling."
    said = {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix) and not key.endswith(".finetuned")
    }
    kind = said.pop("type", "linear" if "factor" in said else "none")
    factor = said.pop("factor", header.of_architecture("rope.scale_linear") or 1.0)
    if "rope_freqs.weight" in header.tensors:
        return _llama3(header, file)
    if long := sorted(name for name in header.tensors if name.startswith("rope_factors_")):
        raise DecantError(f"{file} scales positions by a table ({long[0]}): {_INSTEAD}")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    original = said.pop("original_context_length", None)
    found: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        found["original_max_position_embeddings"] = original
        for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if theirs in said:
                found[ours] = said.pop(theirs)
    neutral = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0}
    unknown = {key: value for key, value in said.items() if neutral.get(key) != value}
    if kind not in ("linear", "yarn") or unknown or (kind == "yarn" and not original):
        raise DecantError(
            f"{file} scales positions by rope type {kind!r} with "
            f"{dict(sorted(unknown.items())) or {'original_context_length': original}}, which is "
            f"not read back: {_INSTEAD}"
        )
    return found


def _llama3(header: Header, file: Path) -> dict[str, Any] | None:
    """Reconstruct Llama 3's scaling; the file holds only the ratios plain / stretched frequencies.

    low_freq_factor and high_freq_factor are 1 and 4 in all of Meta's models. With these, the factor
    is the largest ratio, and any pair between the two ends determines the original context.
    """
    stored = header.tensors["rope_freqs.weight"]
    if stored.format != _FLOAT32:
        raise DecantError(f"{file} holds rope_freqs.weight in another format than float32")
    with file.open("rb") as stream:
        stream.seek(stored.start)
        data = np.frombuffer(stream.read(4 * math.prod(stored.shape)), "<f4").astype(np.float64)
    ratios = torch.from_numpy(data)
    if bool((ratios == 1).all()):
        return None
    theta = float(header.of_architecture("rope.freq_base") or 10_000.0)
    plain = inverse_frequencies(2 * len(ratios), theta, None).double()
    factor = round(float(ratios.max()), 4)
    for original in _original_contexts(ratios, plain, factor):
        scaling = Llama3Scaling(
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=original,
        )
        if torch.allclose(plain / scaling.stretch(plain, theta), ratios, rtol=1e-4, atol=0):
            return {"rope_type": "llama3", **vars(scaling)}
    raise DecantError(
        f"{file} scales positions by a table (rope_freqs.weight) that is not Llama 3's: {_INSTEAD}"
    )


def _original_contexts(ratios: Tensor, plain: Tensor, factor: float) -> list[int]:
    """Return original contexts that fit the pairs between both ends, or else the ends."""
    kept = (1 / ratios - 1 / factor) / (1 - 1 / factor)
    between = (kept > 0.01) & (kept < 0.99)
    if bool(between.any()):
        turns = 1.0 + 3.0 * kept[between]
        return [round(float(2 * math.pi * (turns / plain[between]).mean()))]
    fast, slow = plain[kept > 0.5], plain[kept <= 0.5]
    if not len(fast) or not len(slow):
        return [8192]
    return [round(2 * math.pi * math.sqrt(4.0 / float(fast.min()) / float(slow.max())))]


def _scale_positions(config: Any, scaling: dict[str, Any], file: Path) -> None:
    """Add the scaling to a config that transformers created without it."""
    rope = getattr(config, "rope_parameters", None) or {"rope_type": "unknown"}
    nested = any(isinstance(value, dict) for value in rope.values())  # by the type of layer
    if nested or rope.get("rope_type", "default") != "default":
        raise DecantError(
            f"{file} scales the positions of a {config.model_type!r} model by rope type "
            f"{scaling['rope_type']!r}, which is not read back for this architecture: {_INSTEAD}"
        )
    config.rope_parameters = {"rope_theta": rope["rope_theta"], **scaling}


def _require_finite(model: Any, file: Path) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise DecantError(
                f"{file} holds numbers in {name} that are not finite: download the file again"
            )


def _damaged(file: Path, what: str) -> DecantError:
    return DecantError(f"{file} {what}, so that it is not a complete GGUF file: download it again")
