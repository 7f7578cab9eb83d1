"""A trained student as a Hugging Face folder that opens with none of our code.

A run's model is such a folder already, in float32 and with a config.json of the least that ours
needs. Here transformers reads it and writes it again, in the number format that is published, with
all that its classes and other programs look for: special ids, generation_config.json, the
tokenizer with its chat template, and a model card (pipeline/export/card.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.data.corpus import load_tokenizer
from pipeline.errors import DecantError
from pipeline.model.folder import TOKENIZER_FILES, copy_files
from pipeline.model.hugging_face import load_causal_lm
from pipeline.runtime.device import dtype_name
from pipeline.runtime.optional import import_transformers
from pipeline.text_generator import default_eos_ids

_LOCAL = ("is_local", "local_files_only", "backend")
"""What transformers notes in tokenizer_config.json about the machine that it was saved on."""


def write_hugging_face(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write model, tokenizer and both configurations of `source` into an existing folder.

    Args:
        source: a Hugging Face folder of any architecture that transformers knows.
        dtype: weights are rounded to it.

    Raises:
        DecantError: no usable model or tokenizer, or weights that are not finite in `dtype`.
    """
    model = load_causal_lm(source, dtype, what="model")
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise DecantError(
                f"{source} has numbers in {name} that are not finite in {dtype_name(dtype)}: set "
                "export.dtype=bfloat16, or train again if the model is damaged"
            )
    tokenizer = load_tokenizer(source)
    said = json.loads((source / "config.json").read_text())
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in ids.items():
        if name not in said:  # the class's own default means another tokenizer's token
            setattr(model.config, name, value)
    if not (source / "generation_config.json").exists():
        eos = said.get("eos_token_id")
        ids["eos_token_id"] = default_eos_ids(tokenizer) if eos is None else eos
        model.generation_config = import_transformers().GenerationConfig(**ids)
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # written for their owner's eyes alone
        weights.chmod((folder / "config.json").stat().st_mode)
    copy_files(source, TOKENIZER_FILES, folder)
    _clean_tokenizer_config(folder / "tokenizer_config.json")


def _clean_tokenizer_config(file: Path) -> None:
    """Take out what concerns the machine, and name a class that older transformers have too."""
    if not file.exists():
        return
    content: dict[str, Any] = json.loads(file.read_text())
    kept = {name: value for name, value in content.items() if name not in _LOCAL}
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
