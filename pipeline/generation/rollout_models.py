"""The model that writes rollouts: our own, any other by transformers, or one in vLLM.

The first two choose tokens by the same function and the same random numbers, so both give the same
rollouts (tests/generation/test_rollouts.py). transformers' `generate` keeps the cache, which
differs from architecture to architecture; a logits processor of ours makes the choice.

vLLM draws by its own random numbers, with a seed for each rollout, in the process that also runs
teachers (pipeline/teacher/vllm_process.py). It continues many prompts at once and admits the next
one as soon as one has ended.

Shapes: B batch, T tokens so far, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.cache_params import VllmParams
from pipeline.errors import DecantError, ParamsError
from pipeline.generation.sampling import GenerationSettings, choose, generate_ids, pad_left
from pipeline.model.config_json import load_config
from pipeline.model.huggingface import load_causal_lm, max_positions
from pipeline.model.weights import load_student, read_config
from pipeline.runtime.device import dtype_name, place_rounded
from pipeline.runtime.optional import import_transformers
from pipeline.teacher.vllm_process import VllmProcess

RolloutModel = Callable[[Sequence[list[int]], GenerationSettings, Tensor], list[list[int]]]
"""Return the new tokens of each prompt, with a closing eos.

The last argument, float64 [B, max_new_tokens] in [0, 1), decides what is sampled.
"""


def context_of(folder: Path) -> int | None:
    """Return the tokens of the longest text that a model can read; None if there is no limit."""
    try:
        return read_config(folder).max_seq_len
    except DecantError:
        return max_positions(load_config(folder))


def open_rollout_model(
    folder: Path, dtype: torch.dtype, device: torch.device, *, dequantize: bool
) -> RolloutModel:
    """Open the model of a Hugging Face folder.

    Args:
        dequantize: see `load_causal_lm`.

    Raises:
        DecantError: the folder does not contain a model that can be run.
    """
    try:
        read_config(folder)
    except DecantError:
        return _OfTransformers(folder, dtype, device, dequantize=dequantize)
    return _Ours(folder, dtype, device)


class _Ours:
    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._student = place_rounded(load_student(folder).eval(), dtype, device)

    def __call__(
        self, prompts: Sequence[list[int]], settings: GenerationSettings, uniforms: Tensor
    ) -> list[list[int]]:
        return generate_ids(self._student, prompts, settings, uniforms=uniforms)


class _OfTransformers:
    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, *, dequantize: bool
    ) -> None:
        model = load_causal_lm(folder, dtype, what="model", device=device, dequantize=dequantize)
        self._model = place_rounded(model, dtype, device)
        self._device = device
        # `generate` would take from it whatever is not given, for example a repetition penalty.
        self._model.generation_config = import_transformers().GenerationConfig()

    def __call__(
        self, prompts: Sequence[list[int]], settings: GenerationSettings, uniforms: Tensor
    ) -> list[list[int]]:
        tokens, real = pad_left(prompts, self._device)
        ends = list(settings.eos_ids or ())
        output = self._model.generate(
            tokens,
            attention_mask=real.long(),
            logits_processor=[_Choose(settings, uniforms, tokens.shape[1])],
            do_sample=False,
            num_beams=1,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,  # put after the eos of a row, and cut off below
        )
        new = output[:, tokens.shape[1] :].tolist()
        return [_up_to_end(ids, ends) for ids in new]


class VllmRollouts:
    """A model folder run by vLLM; see `RolloutModel`.

    Args:
        params: interpreter and options of vLLM.
        row_length: number of tokens in the longest row.

    Raises:
        DecantError: vLLM cannot be started, or cannot load the model in this dtype.
        ParamsError: the device is one of several GPUs.
    """

    def __init__(
        self,
        folder: Path,
        params: VllmParams,
        *,
        row_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if device.index is not None:
            raise ParamsError(
                f"device={device} does not reach vLLM, which takes the first GPUs that it sees: "
                "set device=cuda, and CUDA_VISIBLE_DEVICES to the GPU's number"
            )
        arguments: dict[str, Any] = {
            "disable_log_stats": True,
            "enable_prefix_caching": False,  # so that a rollout is computed in the same way again
            **params.options,
            "model": str(folder.absolute()),
            "runner": "generate",
            "generation_config": "vllm",  # not the folder's
            "dtype": dtype_name(dtype),
            "max_model_len": min(row_length, context_of(folder) or row_length),
        }
        threads = torch.get_num_threads() if device.type == "cpu" else None
        engine = VllmProcess(params.python, arguments, threads=threads, key="rollouts.engine")
        if (found := engine.about["dtype"]) != dtype_name(dtype):
            engine.close()
            raise DecantError(
                f"vLLM {engine.version} computes {folder} in {found} though {dtype_name(dtype)} "
                f"was asked: set rollouts.dtype to {found}"
            )
        self._engine: VllmProcess = engine

    def __call__(
        self, prompts: Sequence[list[int]], settings: GenerationSettings, uniforms: Tensor
    ) -> list[list[int]]:
        ends = list(settings.eos_ids or ())
        common = {
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature or 0.0,
            "top_p": settings.top_p or 1.0,
            "stop_token_ids": ends,
            "ignore_eos": True,  # these alone end a rollout
            "detokenize": False,
        }
        seeds = (uniforms[:, 0] * 2**53).long().tolist()  # as random as the numbers themselves
        new = self._engine.continuations(
            np.concatenate([np.array(prompt, np.int32) for prompt in prompts]),
            list(map(len, prompts)),
            [common | {"seed": seed} for seed in seeds],
        )
        return [_within(_up_to_end(ids, ends), settings.num_ids) for ids in new]


class _Choose:
    """A logits processor that leaves one id possible: the one that `choose` takes."""

    def __init__(self, settings: GenerationSettings, uniforms: Tensor, prompt_len: int) -> None:
        self._settings, self._uniforms, self._prompt_len = settings, uniforms, prompt_len

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Map scores [B, V] after tokens [B, T] to 0 for the chosen id and -inf for all others."""
        chance = self._uniforms[:, input_ids.shape[1] - self._prompt_len].to(scores.device)
        chosen = choose(scores, input_ids, self._settings, chance)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def _up_to_end(ids: list[int], ends: list[Any]) -> list[int]:
    """Cut new tokens after the first one that ends a text."""
    stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _within(ids: list[int], num_ids: int | None) -> list[int]:
    """Refuse ids that no tokenizer has, which vLLM cannot be kept from choosing at no cost."""
    if num_ids is not None and max(ids) >= num_ids:
        raise DecantError(
            f"vLLM sampled id {max(ids)}, a row of the head that none of the tokenizer's "
            f"{num_ids:,} ids uses: lower rollouts.top_p, or choose rollouts.engine=transformers"
        )
    return ids
