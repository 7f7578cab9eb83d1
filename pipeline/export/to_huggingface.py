"""Export a trained student as a Hugging Face folder that opens without any of our code.

A run's model already is such a folder, in float32 and with the minimal config.json that our code
needs. Here transformers reads it and writes it again in the published dtype, with everything that
its classes and other programs look for: special ids, generation_config.json, the tokenizer with its
chat template, and a model card (pipeline/export/card.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import DecantError
from pipeline.generation.text_generator import default_eos_ids
from pipeline.model.config_json import read_config_json
from pipeline.model.folder import copy_files
from pipeline.model.huggingface import load_causal_lm
from pipeline.model.tokenizer import (
    TokenizerClassError,
    load_tokenizer,
    require_kept,
    save_tokenizer,
)
from pipeline.model.weights import VariantError, load_student, save_student
from pipeline.runtime.device import dtype_name
from pipeline.runtime.optional import import_transformers

_LOCAL = ("is_local", "local_files_only", "backend")
"""Keys that transformers writes to tokenizer_config.json about the local machine."""


def write_huggingface(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write model, tokenizer and both configurations of `source` into an existing folder.

    Args:
        source: a Hugging Face folder of any architecture that transformers knows.
        dtype: dtype that weights are rounded to.

    Raises:
        DecantError: there is not a usable model or tokenizer, weights are not finite in `dtype`, or
            transformers would not open that tokenizer with such a model.
    """
    model = load_causal_lm(source, dtype, what="model")
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise DecantError(
                f"{source} has numbers in {name} that are not finite in {dtype_name(dtype)}: set "
                "export.dtype=bfloat16, or train again if the model is damaged"
            )
    tokenizer = load_tokenizer(source)
    said = read_config_json(source)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in ids.items():
        if name not in said:  # the class's default would be another tokenizer's token
            setattr(model.config, name, value)
    if not (source / "generation_config.json").exists():
        eos = said.get("eos_token_id")
        ids["eos_token_id"] = default_eos_ids(tokenizer) if eos is None else eos
        model.generation_config = import_transformers().GenerationConfig(**ids)
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # written with owner-only permissions
        weights.chmod((folder / "config.json").stat().st_mode)
    try:
        save_tokenizer(source, folder)
    except TokenizerClassError:
        with _as_llama(source) as llama:
            write_huggingface(llama, folder, dtype)
        return
    _clean_tokenizer_config(folder / "tokenizer_config.json")


@contextmanager
def _as_llama(source: Path) -> Iterator[Path]:
    """Yield the same model and tokenizer under a type with which transformers keeps the tokenizer.

    Runs of older versions have type qwen2 with any tokenizer; see pipeline/model/weights.py.

    Raises:
        TokenizerClassError: this architecture has no such type.
    """
    try:
        student = load_student(source)
    except VariantError:
        require_kept(source)
        raise
    said = read_config_json(source)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_student(student, folder, tokenizer_from=source)
        copy_files(source, ["generation_config.json"], folder)
        content = json.loads((folder / "config.json").read_text())
        content |= {name: value for name, value in said.items() if name.endswith("_token_id")}
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        yield folder


def _clean_tokenizer_config(file: Path) -> None:
    """Remove what describes the machine, and name a class that older transformers have too."""
    if not file.exists():
        return
    content: dict[str, Any] = json.loads(file.read_text())
    kept = {name: value for name, value in content.items() if name not in _LOCAL}
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
