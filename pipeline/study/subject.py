"""The model under study, loaded once for all parts: Hugging Face's and ours from the same folder.

Both run in float32, where agreement is meaningful: bfloat16 alone would make them differ by 1e-2.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.delivery_params import StudyParams
from pipeline.errors import DecantError, ParamsError, memory_shortage, reason_of
from pipeline.model.config_json import load_config, read_config_json
from pipeline.model.decoder import ModelConfig, StudentModel, TransformerBlock
from pipeline.model.folder import require_regular_folder
from pipeline.model.model_dtype import model_dtype
from pipeline.model.quantization import refuse_quantized
from pipeline.model.tokenizer import load_tokenizer
from pipeline.model.weights import load_student, read_config
from pipeline.runtime.optional import import_transformers
from pipeline.teacher.fetch import download_snapshot

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(model: str, revision: str | None) -> Path:
    """Return the folder of a model given by its path or by its id on the Hugging Face hub.

    A snapshot stays in the hub library's cache, so it is downloaded once.

    Raises:
        DecantError: there is no such folder, or the hub cannot be reached.
    """
    if (Path(model) / "config.json").exists():
        return Path(model)
    if Path(model).exists() or not _HUB_ID.fullmatch(model):
        raise DecantError(
            f"--model {model} is no folder with a config.json: name one, or an id of the Hugging "
            "Face hub, or run stages/fetch.py for the teacher"
        )
    return download_snapshot(
        model,
        revision,
        named="--model",
        remedy="no folder of that name exists either; check name, revision and connection",
    )


class Subject:
    """A model folder and the settings of its study; models are loaded when first needed.

    Args:
        folder: Hugging Face folder with safetensors and tokenizer.json; no code from it is run.
        layer: the decoder layer to study, from 0.

    Raises:
        ParamsError: there is no such layer, prompt and new tokens exceed the model's context, or
            the device has no units for study.dtype.
    """

    def __init__(
        self, folder: Path, params: StudyParams, *, layer: int, device: torch.device, seed: int
    ) -> None:
        self.folder = folder
        self.params = params
        self.layer = layer
        self.device = device
        self.speed_dtype = model_dtype(params.dtype, folder, device, key="study.dtype")
        self.seed = seed
        self.tokenizer = load_tokenizer(folder)
        layers = self.config.num_hidden_layers
        context = getattr(self.config, "max_position_embeddings", None)
        if not 0 <= layer < layers:
            raise ParamsError(f"--layer {layer} must lie within 0..{layers - 1} of {folder}")
        need = len(self.prompt_ids) + params.max_new_tokens
        if context is not None and need > context:
            raise ParamsError(
                f"study.prompt and study.max_new_tokens={params.max_new_tokens} take {need} "
                f"positions, {folder} has {context}: shorten them"
            )

    @cached_property
    def config(self) -> Any:
        """Hugging Face's configuration."""
        read_config_json(self.folder)
        try:
            return load_config(self.folder)
        except Exception as error:
            if memory_shortage(error):
                raise
            raise _unusable(self.folder, error) from error

    @cached_property
    def theirs(self) -> Any:
        """Hugging Face's model in float32, with `eager` attention, whose scores are accessible.

        The folder's own sampling defaults are removed and its end tokens kept: a comparison that
        samples sets its own options.
        """
        transformers = import_transformers()
        require_regular_folder(self.folder)
        refuse_quantized(self.folder, "study")
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except Exception as error:
            if memory_shortage(error):
                raise
            raise _unusable(self.folder, error) from error
        ends = model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=ends, pad_token_id=ends[0] if ends else 0
        )
        return model.to(self.device).eval().requires_grad_(False)

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids after which generation stops."""
        return frozenset(self.theirs.generation_config.eos_token_id or ())

    @cached_property
    def unsupported(self) -> str | None:
        """The reason why our model cannot read the folder, as a sentence; None if it can."""
        try:
            read_config(self.folder)
        except DecantError as error:
            return str(error)
        return None

    @cached_property
    def our_config(self) -> ModelConfig:
        return read_config(self.folder)

    @cached_property
    def ours(self) -> StudentModel:
        """Our model from the same folder, in float32, on the same device."""
        return load_student(self.folder).to(self.device).eval().requires_grad_(False)

    @property
    def our_block(self) -> TransformerBlock:
        """Layer `layer` of our model."""
        block = self.ours.model.layers[self.layer]
        assert isinstance(block, TransformerBlock)
        return block

    @cached_property
    def prompt_ids(self) -> list[int]:
        """The ids of `study.prompt`, with the tokenizer's defaults."""
        ids: list[int] = self.tokenizer(self.params.prompt)["input_ids"]
        return ids

    @property
    def prompt(self) -> Tensor:
        """`prompt_ids` as int64 [1, L] on the device."""
        return torch.tensor([self.prompt_ids], device=self.device)

    def describe(self) -> str:
        """Describe the folder and its model type in one line."""
        return f"{self.folder} ({self.config.model_type})"


def _unusable(folder: Path, error: Exception) -> DecantError:
    """Return the error for a damaged folder; damage can raise errors of several libraries."""
    reason = reason_of(error)
    return DecantError(f"{folder} cannot be read as a causal language model: {reason}")
