"""Write Qwen2 and Llama folders as GGUF files, for llama.cpp and the programs built on it.

Names and metadata are those of llama.cpp's own converter (its conversion/llama.py and qwen.py); the
package gguf provides the format. Matrices are stored in the chosen format, vectors (norms and
biases) in float32. q8_0 stores, for each 32 weights of a row, 32 integers and their scale, the
largest weight / 127 in float16; a matrix whose row length is not a multiple of 32 stays float16 in
such a file.

llama.cpp rotates neighbouring dimensions of a Llama's queries and keys, where Hugging Face rotates
dimension i with i + E / 2, so their rows are reordered; those of a Qwen2 are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.errors import DecantError
from pipeline.export.gguf_vocabulary import add_tokenizer
from pipeline.io.files import fsync
from pipeline.model.config_json import read_config_json
from pipeline.model.decoder import ModelConfig
from pipeline.model.rope import Llama3Scaling, YarnScaling, inverse_frequencies
from pipeline.model.weights import OUT_BIAS, VariantError, read_config, stream_tensors
from pipeline.runtime.console import progress
from pipeline.runtime.optional import require

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_LARGEST_F16 = 65504.0


def require_gguf() -> Any:
    """Import the package gguf.

    Raises:
        DecantError: it is not installed.
    """
    return require("gguf", "gguf", "a GGUF file", instead=", or set export.gguf=[]")


def require_convertible(folder: Path) -> ModelConfig:
    """Return the configuration of a folder that can be written as GGUF.

    Raises:
        DecantError: it has another architecture, or a variant that llama.cpp computes differently.
    """
    try:
        config = read_config(folder)
    except VariantError as error:
        raise DecantError(
            f"no GGUF file can be written of this model ({error}): set export.gguf=[], or use "
            "llama.cpp's own converter on the Hugging Face folder"
        ) from None
    scaling = config.rope_scaling
    if isinstance(scaling, YarnScaling):
        named = scaling.factor, scaling.original_max_position_embeddings
        plain = YarnScaling(factor=named[0], original_max_position_embeddings=named[1])
        limits = scaling.beta_fast, scaling.beta_slow, scaling.truncate
        same = math.isclose(scaling.amplitude(), plain.amplitude(), rel_tol=1e-6)
        if not same or limits != (plain.beta_fast, plain.beta_slow, plain.truncate):
            raise DecantError(
                f"{folder} has a YaRN with an attention_factor, mscale, beta or truncate of its "
                "own, which llama.cpp does not follow: set export.gguf=[]"
            )
    if isinstance(scaling, Llama3Scaling) and config.attention_bias:
        raise DecantError(
            f"{folder} is a qwen2 model with rope type 'llama3', which llama.cpp has for llama "
            "alone: set export.gguf=[]"
        )
    return config


def write_gguf(
    folder: Path, file: Path, kind: str, *, name: str, license_id: str | None = None
) -> None:
    """Convert a Hugging Face folder; `file` is either complete or does not exist.

    Args:
        kind: f32, f16, bf16 or q8_0.
        name: name of the model, as llama.cpp shows it.
        license_id: for example apache-2.0.

    Raises:
        DecantError: llama.cpp does not support the architecture or the tokenizer, weights are too
            large for float16, or the folder is damaged.
    """
    gguf, config = require_gguf(), require_convertible(folder)
    raw = read_config_json(folder)
    partial = file.with_name(f".{file.name}.partial")
    writer = gguf.GGUFWriter(partial, "qwen2" if config.attention_bias else "llama")
    try:
        _add_metadata(writer, config, kind, name, license_id)
        add_tokenizer(writer, folder, config.vocab_size, raw)
        plan = _plan(folder, config, kind)
        for tensor in plan.values():
            writer.add_tensor_info(
                tensor.name,
                tensor.stored_shape,
                np.dtype(tensor.dtype),
                tensor.num_bytes,
                tensor.format,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for source, values in progress(
            _values(folder, config), what=file.name, unit="tensor", total=len(plan)
        ):
            writer.write_tensor_data(_encode(values, plan[source], file))
        writer.close()
        fsync(partial)
        partial.replace(file)
        fsync(file.parent)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Stored:
    """Name, format and shape of a tensor in the file."""

    name: str
    format: Any  # gguf.GGMLQuantizationType
    stored_shape: tuple[int, ...]  # in bytes if the format has blocks
    dtype: str  # NumPy's name

    @property
    def num_bytes(self) -> int:
        return math.prod(self.stored_shape) * np.dtype(self.dtype).itemsize


_SUFFIXES = (".weight", ".bias")
_ROPE = "rope_freqs.weight"


def _plan(folder: Path, config: ModelConfig, kind: str) -> dict[str, _Stored]:
    """Map Hugging Face's names to stored tensors, in the order of `_sources`."""
    gguf = require_gguf()
    architecture = gguf.MODEL_ARCH.QWEN2 if config.attention_bias else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    plan = {}
    for source, tensor in _sources(folder, config):
        target = source if source == _ROPE else names.get_name(source, _SUFFIXES)
        if target is None:
            raise DecantError(f"{folder} holds {source}, which no {architecture.name} model has")
        plan[source] = _placed(target, tuple(tensor.shape), kind)
    return plan


def _placed(target: str, shape: tuple[int, ...], kind: str) -> _Stored:
    gguf = require_gguf()
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]
    if len(shape) == 1:
        kind = "f32"
    elif kind == "q8_0" and shape[-1] % block:
        kind = "f16"
    format_ = gguf.GGMLQuantizationType[kind.upper()]
    if kind in ("bf16", "q8_0"):
        return _Stored(target, format_, gguf.quant_shape_to_byte_shape(shape, format_), "uint8")
    return _Stored(target, format_, shape, {"f16": "float16", "f32": "float32"}[kind])


def _sources(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor for the file, as stored in the folder."""
    for name, tensor in stream_tensors(folder):
        tied = name == "lm_head.weight" and config.tie_embeddings  # llama.cpp uses the embedding
        if name.endswith(OUT_BIAS) and tensor.any():
            raise DecantError(
                f"{folder} has {name} other than zero, and its config.json says attention_out_bias="
                "false: set export.gguf=[], or use llama.cpp's own converter"
            )
        # Old folders store inv_freq, which can be computed; see pipeline/model/weights.py for
        # OUT_BIAS.
        if not tied and not name.endswith((".rotary_emb.inv_freq", OUT_BIAS)):
            yield name, tensor
    if isinstance(config.rope_scaling, Llama3Scaling):
        plain = inverse_frequencies(config.head_size, config.rope_theta, None)
        slowed = inverse_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
        yield _ROPE, plain / slowed


def _values(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the same tensors in llama.cpp's layout, float32, with one in memory at a time."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for name, tensor in _sources(folder, config):
        projection = name.split(".")[-2]
        if projection in heads and not config.attention_bias:
            tensor = interleave_halves(tensor, heads[projection])
        yield name, tensor.float()


def interleave_halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows [heads * E, ...] so that dimensions i and i + E / 2 of a head are neighbours."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _encode(values: Tensor, stored: _Stored, file: Path) -> Any:
    if not bool(values.isfinite().all()):
        raise DecantError(f"{stored.name} holds numbers that are not finite: the model is damaged")
    largest = float(values.abs().max())
    if stored.dtype == "float16" and largest > _LARGEST_F16:
        raise DecantError(
            f"{stored.name} holds {largest:g}, beyond float16's {_LARGEST_F16:g}, so {file.name} "
            "cannot hold it: choose bf16 in export.gguf"
        )
    data = require_gguf().quants.quantize(values.contiguous().numpy(), stored.format)
    assert data.nbytes == stored.num_bytes
    return data


def _add_metadata(
    writer: Any, config: ModelConfig, kind: str, name: str, license_id: str | None
) -> None:
    gguf = require_gguf()
    writer.add_type("model")
    writer.add_name(name)
    if license_id:
        writer.add_license(license_id)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    scaling: Any = config.rope_scaling
    if scaling is not None and not isinstance(scaling, Llama3Scaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
        writer.add_rope_scaling_factor(scaling.factor)
    if isinstance(scaling, YarnScaling):
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
