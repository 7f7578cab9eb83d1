"""The model under study, loaded once for all parts: Hugging Face's and ours from the same folder.

Both run in float32, where agreement means something: bfloat16 alone would differ by 1e-2.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import StudyParams
from pipeline.errors import DecantError, ParamsError
from pipeline.model.config import read_config_json
from pipeline.model.folder import require_regular_folder
from pipeline.model.student import ModelConfig, StudentModel, TransformerBlock
from pipeline.model.tokenizer import load_tokenizer
from pipeline.model.weights import load_student, read_config
from pipeline.runtime.device import inference_dtype
from pipeline.runtime.optional import import_transformers
from pipeline.teacher.fetch import download_snapshot

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(model: str, revision: str | None) -> Path:
    """The folder of a model named by its path or by its id on the Hugging Face hub.

    A snapshot of the hub is kept in the hub's own cache, so it is downloaded once.

    Raises:
        DecantError: no such folder, or the hub cannot be reached.
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
    """A model folder and the settings it is studied under; what is loaded, is loaded when needed.

    Args:
        folder: Hugging Face folder with safetensors and tokenizer.json; no code from it is run.
        layer: the decoder layer looked into, from 0.

    Raises:
        ParamsError: no such layer, prompt and new tokens exceed the model's context, or the device
            has no units for study.dtype.
    """

    def __init__(
        self, folder: Path, params: StudyParams, *, layer: int, device: torch.device, seed: int
    ) -> None:
        self.folder = folder
        self.params = params
        self.layer = layer
        self.device = device
        self.speed_dtype = inference_dtype(params.dtype, device, key="study.dtype")
        self.seed = seed
        self.tokenizer = load_tokenizer(folder)
        layers = self.config.num_hidden_layers
        context = getattr(self.config, "max_position_embeddings", None)
        if not 0 <= layer < layers:
            raise ParamsError(f"--layer {layer} must lie within 0..{layers - 1} of {folder}")
        need = len(self.prompt_ids) + params.new_tokens
        if context is not None and need > context:
            raise ParamsError(
                f"study.prompt and study.new_tokens={params.new_tokens} take {need} positions, "
                f"{folder} has {context}: shorten them"
            )

    @cached_property
    def config(self) -> Any:
        """Hugging Face's configuration."""
        read_config_json(self.folder)
        try:
            return import_transformers().AutoConfig.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise _unusable(self.folder, error) from error

    @cached_property
    def theirs(self) -> Any:
        """Hugging Face's model in float32, with `eager` attention, whose scores can be seen.

        The folder's own sampling defaults are put aside, its end tokens kept: what a comparison
        samples by, it says itself.
        """
        transformers = import_transformers()
        require_regular_folder(self.folder)
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
        """Why our model cannot read the folder, as a sentence; None where it can."""
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
        """Our model from the same folder, float32, on the same device."""
        return load_student(self.folder).to(self.device).eval().requires_grad_(False)

    @property
    def our_block(self) -> TransformerBlock:
        """Layer `layer` of ours."""
        block = self.ours.model.layers[self.layer]
        assert isinstance(block, TransformerBlock)
        return block

    @cached_property
    def prompt_ids(self) -> list[int]:
        """The ids of `study.prompt`, as the tokenizer makes them by default."""
        ids: list[int] = self.tokenizer(self.params.prompt)["input_ids"]
        return ids

    @property
    def prompt(self) -> Tensor:
        """`prompt_ids` as int64 [1, L] on the device."""
        return torch.tensor([self.prompt_ids], device=self.device)

    def describe(self) -> str:
        """The folder and its kind, in a line."""
        return f"{self.folder} ({self.config.model_type})"


def _unusable(folder: Path, error: Exception) -> DecantError:
    """What to raise for damage, which shows as errors of several libraries."""
    reason = " ".join(str(error).split())[:200]
    return DecantError(f"{folder} cannot be read as a causal language model: {reason}")
