"""Write Hugging Face folders as GGUF files, for llama.cpp and the programs built on it.

pipeline/export/gguf_models.py has the architectures, gguf_vocabulary.py the tokenizers; the package
gguf provides the format. Matrices are stored in the chosen format, vectors (norms and biases) in
float32. q8_0 stores, for each 32 weights of a row, 32 integers and their scale, the largest weight
/ 127 in float16; a matrix whose row length is not a multiple of 32 stays float16 in such a file.
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
from pipeline.export.gguf_models import GgufModel, require_convertible
from pipeline.export.gguf_vocabulary import add_tokenizer
from pipeline.io.files import fsync
from pipeline.model.config_json import read_config_json
from pipeline.model.weights import OUT_BIAS, stream_tensors
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
    gguf, model = require_gguf(), require_convertible(folder)
    raw = read_config_json(folder)
    partial = file.with_name(f".{file.name}.partial")
    writer = gguf.GGUFWriter(partial, model.architecture)
    try:
        _add_metadata(writer, model, kind, name, license_id)
        add_tokenizer(writer, folder, model.num_rows, raw)
        plan = _plan(folder, model, kind)
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
            _values(folder, model), what=file.name, unit="tensor", total=len(plan)
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


def _plan(folder: Path, model: GgufModel, kind: str) -> dict[str, _Stored]:
    """Map Hugging Face's names to stored tensors, in the order of `_values`."""
    gguf = require_gguf()
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == model.architecture)
    names = gguf.get_tensor_name_map(architecture, model.num_layers)
    plan = {}
    for source, tensor in _sources(folder, model):
        target = names.get_name(source, _SUFFIXES)
        if target is None:
            raise DecantError(f"{folder} holds {source}, which no {model.architecture} model has")
        plan[source] = _placed(target, tuple(tensor.shape), kind)
    for name, tensor in model.tensors.items():
        plan[name] = _placed(name, tuple(tensor.shape), kind)
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


def _sources(folder: Path, model: GgufModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the folder that the file has too, as stored."""
    for name, tensor in stream_tensors(folder):
        tied = name == "lm_head.weight" and model.tied  # llama.cpp uses the embedding
        if name.endswith(OUT_BIAS) and tensor.any():
            raise DecantError(
                f"{folder} has {name} other than zero, and its config.json says attention_out_bias="
                "false: set export.gguf=[], or use llama.cpp's own converter"
            )
        # Old folders store inv_freq, which can be computed; see pipeline/model/weights.py for
        # OUT_BIAS.
        if not tied and not name.endswith((".rotary_emb.inv_freq", OUT_BIAS)):
            yield name, tensor


def _values(folder: Path, model: GgufModel) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors as the file has them, float32, with one in memory at a time."""
    for name, tensor in _sources(folder, model):
        yield name, model.adapt(name, tensor)
    yield from model.tensors.items()


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
    writer: Any, model: GgufModel, kind: str, name: str, license_id: str | None
) -> None:
    gguf = require_gguf()
    writer.add_type("model")
    writer.add_name(name)
    if license_id:
        writer.add_license(license_id)
    for key, value in model.metadata.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
