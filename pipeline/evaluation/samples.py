"""Samples of a model's text: greedy continuations of a few prompts, to read beside the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import DecantError
from pipeline.generation.sampling import GenerationSettings
from pipeline.generation.text_generator import TextGenerator
from pipeline.model.huggingface import load_causal_lm
from pipeline.model.quantization import read_quantization
from pipeline.model.tokenizer import load_tokenizer
from pipeline.model.weights import read_config
from pipeline.runtime.console import progress
from pipeline.runtime.device import place_rounded

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """How a model runs: its number format, where, and whether quantised weights are converted."""

    dtype: torch.dtype = torch.float32
    device: torch.device = _CPU
    dequantize: bool = False


_PLAIN = Run()


def sample(folder: Path, prompts: tuple[str, ...], new_tokens: int, run: Run = _PLAIN) -> list[str]:
    """Continue prompts greedily by the model of a Hugging Face folder.

    Our own model generates for the folders that it supports. A teacher may have another
    architecture, or be quantised; then transformers generates.

    Args:
        run: how the model runs. On a CPU it is in float32, unless it is quantised, which may not be
            possible in that format.
    """
    if run.device.type == "cpu" and read_quantization(folder) is None:
        run = _PLAIN
    settings = GenerationSettings(max_new_tokens=new_tokens, temperature=0.0, repetition_penalty=1)
    try:
        read_config(folder)
    except DecantError:
        return _sample_by_transformers(folder, prompts, new_tokens, run)
    generator = TextGenerator(folder, device=run.device, dtype=run.dtype)
    return generator.generate(prompts, settings)


def _sample_by_transformers(
    folder: Path, prompts: tuple[str, ...], new_tokens: int, run: Run
) -> list[str]:
    tokenizer = load_tokenizer(folder)
    model = load_causal_lm(
        folder, run.dtype, what="model", device=run.device, dequantize=run.dequantize
    )
    model = place_rounded(model, run.dtype, run.device)
    texts = []
    for prompt in progress(prompts, what=f"samples of {folder.name}", unit="prompt"):
        inputs = tokenizer(prompt, return_tensors="pt").to(run.device)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,  # whatever the folder's generation_config.json says
            repetition_penalty=1.0,
        )
        new = output[0][inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts
