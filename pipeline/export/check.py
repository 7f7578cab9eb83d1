"""Check that an exported model agrees on three paths: our generation, transformers, llama.cpp.

All paths continue the same token ids, greedily, with the exported weights. The reference computes
in float32: our own model, or, for an architecture that it does not implement, transformers on the
weights before the export, rounded as in the export. Every other path is teacher-forced along the
reference: if it chooses another token, the difference is counted, and the path continues after the
reference's token, so that one early difference does not hide what follows. A prompt is equal if no
token differs, which means that the path on its own would have written the same text.

Rounding differs between programs and can decide a near tie differently. So a different token counts
as a near tie if the reference's logit of it is below that of the reference's own choice by at most
`NEAR_TIE`. Paths that compute in float32, and f16, pass if every token is equal or a near tie (near
ties do not count as equal) and at least the share `export.min_agreement` is equal: if a model
hardly prefers any token, ties would excuse anything. llama.cpp rounds the factor of a bf16 matrix
to bf16, and the factor of a q8_0 matrix to q8_0, so these paths compute another function: they
pass from `export.min_agreement` on, and are not required to pass.

Tokenizers are compared on lines of the same text: the original's tokenizer.json, the tokenizer that
transformers' AutoTokenizer makes of the exported folder, and llama.cpp's. llama.cpp normalises
nothing but the spaces of SentencePiece's tokenizers, so it gets each line after the tokenizer's own
normaliser, except for these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.delivery_params import ExportParams
from pipeline.errors import DecantError, ParamsError
from pipeline.export.check_result import ExportCheck, PathResult, TokenizerResult
from pipeline.export.gguf_vocabulary import is_sentencepiece
from pipeline.export.llama_cpp import LlamaCpp, has_llama_cpp
from pipeline.generation.sampling import GenerationSettings, generate_ids, pad_left
from pipeline.model.folder import hash_weights
from pipeline.model.huggingface import load_causal_lm, max_positions
from pipeline.model.tokenizer import load_auto_tokenizer, load_tokenizer
from pipeline.model.weights import VariantError, load_student
from pipeline.runtime.console import progress
from pipeline.runtime.device import DTYPES
from pipeline.runtime.optional import import_transformers, install_hint

NEAR_TIE = {"float32": 1e-3, "f32": 1e-3, "f16": 0.05}
"""Largest gap in logits to the reference's own token that is a near tie, by a path's precision."""

WITHOUT_LLAMA_CPP = f"llama.cpp is left out: {install_hint('llama')}"

Generate = Callable[[Sequence[Sequence[int]], int], list[list[int]]]
"""Map prompts and a number of tokens to at most that many greedy tokens for each prompt."""


@dataclass(frozen=True)
class Reference:
    """The continuations that every path is compared with.

    Attributes:
        tokens: for each prompt, the tokens that follow.
        logits: maps token ids to the logits of the next token, float32 [V].
    """

    name: str
    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: Callable[[Sequence[int]], Tensor]


def check_export(
    name: str,
    source: Path,
    folder: Path,
    files: Mapping[str, Path],
    text: str,
    params: ExportParams,
) -> ExportCheck:
    """Compare an exported folder and its GGUF files with each other and with their source.

    Args:
        source: the folder that was exported.
        files: GGUF files by format.
        text: text that prompts and lines are taken from.

    Raises:
        DecantError: a part cannot be loaded.
        ParamsError: prompts exceed the model's context.
    """
    tokenizer = load_tokenizer(folder)
    lines = [line for line in text.splitlines() if line.strip()][: params.lines]
    prompts = cut_prompts(text, tokenizer, params)
    reference = make_reference(source, folder, prompts, params)
    theirs = load_causal_lm(folder, torch.float32, what="export")
    chosen = follow(transformers_generate(theirs), reference)
    paths = [judge("transformers, float32", chosen, reference, NEAR_TIE["float32"], params)]
    del theirs
    original, auto = load_tokenizer(source), load_auto_tokenizer(folder)
    tokenizers = [compare_lines("transformers", [encode(auto, t) for t in lines], original, lines)]
    left_out = [WITHOUT_LLAMA_CPP] if files and not has_llama_cpp() else []
    context = params.prompt_tokens + params.max_new_tokens
    for kind, file in progress(
        [] if left_out else list(files.items()), what="llama.cpp", unit="file"
    ):
        with LlamaCpp(file, context=context) as llama:
            chosen = follow(llama.generate, reference)
            if len(tokenizers) == 1:  # all files contain the same tokenizer
                plain = normalised(tokenizer, lines)
                ids = [llama.tokenize(line) for line in plain]
                tokenizers.append(compare_lines("llama.cpp", ids, tokenizer, plain))
        paths.append(judge(f"llama.cpp, {kind}", chosen, reference, NEAR_TIE.get(kind), params))
    return ExportCheck(
        model=name,
        model_sha256=hash_weights(source),
        reference=reference.name,
        prompts=len(prompts),
        new_tokens=params.max_new_tokens,
        paths=paths,
        tokenizers=tokenizers,
        left_out=left_out,
    )


def cut_prompts(text: str, tokenizer: Any, params: ExportParams) -> list[list[int]]:
    """Return token ids of prompts evenly spaced over a text, each from the start of a line.

    Raises:
        DecantError: the text is too short.
    """
    prompts = []
    for number in range(params.prompts):
        start = len(text) * number // params.prompts
        start = text.find("\n", start) + 1 if number else 0  # 0 too if no line follows
        piece = text[start : start + 16 * params.prompt_tokens]
        prompts.append(list(tokenizer(piece)["input_ids"])[: params.prompt_tokens])
    if not all(prompts):
        raise DecantError(
            f"the text to check by has {len(text)} characters, too few for {params.prompts} "
            "prompts: name a longer one by export.text, or lower export.prompts"
        )
    return prompts


def make_reference(
    source: Path, folder: Path, prompts: list[list[int]], params: ExportParams
) -> Reference:
    """Generate the greedy continuation of each prompt in float32.

    Raises:
        ParamsError: prompt and continuation exceed the model's context.
    """
    try:
        student = load_student(folder).eval()
    except VariantError:
        model = load_causal_lm(source, DTYPES[params.dtype], what="model").float()
        name, generate = "transformers, float32, before the export", transformers_generate(model)

        def run(tokens: Tensor) -> Tensor:
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
            return logits

        limit = max_positions(model.config)
    else:
        name, limit, run = "ours, float32", student.max_seq_len, student

        def generate(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
            settings = GenerationSettings(max_new_tokens=new_tokens, temperature=0.0)
            return generate_ids(student, prompts, settings)

    longest = max(map(len, prompts)) + params.max_new_tokens
    if limit is not None and longest > limit:
        raise ParamsError(
            f"export.prompt_tokens={params.prompt_tokens} and export.max_new_tokens="
            f"{params.max_new_tokens} exceed the model's context of {limit}: lower one of them"
        )

    @torch.inference_mode()
    def logits(ids: Sequence[int]) -> Tensor:
        return run(torch.tensor([list(ids)]))[0, -1]

    return Reference(name, prompts, generate(prompts, params.max_new_tokens), logits)


def transformers_generate(model: Any) -> Generate:
    """Return greedy generation by a transformers model, whatever its generation_config says."""
    settings = import_transformers().GenerationConfig(
        do_sample=False, eos_token_id=None, pad_token_id=0
    )
    model.generation_config = settings

    @torch.inference_mode()
    def generate(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        tokens, real = pad_left(prompts, torch.device("cpu"))
        out = model.generate(tokens, attention_mask=real.long(), max_new_tokens=new_tokens)
        new: list[list[int]] = out[:, tokens.shape[1] :].tolist()
        return new

    return generate


def follow(generate: Generate, reference: Reference) -> list[list[int]]:
    """Return the path's choice after each of the reference's tokens, as many as there are."""
    chosen: list[list[int]] = [[] for _ in reference.prompts]
    pairs = list(zip(reference.prompts, reference.tokens, strict=True))
    while waiting := [i for i, (_, wanted) in enumerate(pairs) if len(chosen[i]) < len(wanted)]:
        texts = [pairs[i][0] + pairs[i][1][: len(chosen[i])] for i in waiting]
        most = max(len(pairs[i][1]) - len(chosen[i]) for i in waiting)
        for i, new in zip(waiting, generate(texts, most), strict=True):
            if not new:
                raise DecantError("a path gives no token at all: it is of another version")
            for token, wanted in zip(new, pairs[i][1][len(chosen[i]) :], strict=False):
                chosen[i].append(token)
                if token != wanted:
                    break
    return chosen


def judge(
    name: str,
    chosen: Sequence[Sequence[int]],
    reference: Reference,
    near_tie: float | None,
    params: ExportParams,
) -> PathResult:
    """Count equal tokens; `near_tie` is None for a path whose tokens may differ."""
    tokens = equal = ties = prompts = 0
    for prompt, wanted, found in zip(reference.prompts, reference.tokens, chosen, strict=True):
        differing = [i for i, token in enumerate(wanted) if found[i] != token]
        tokens, equal = tokens + len(wanted), equal + len(wanted) - len(differing)
        prompts += not differing
        for i in differing:
            logits = reference.logits(prompt + wanted[:i])
            gap = float(logits[wanted[i]] - logits[found[i]])
            ties += near_tie is not None and gap <= near_tie
    required = near_tie is not None
    agrees = equal / tokens >= params.min_agreement
    passed = agrees and (equal + ties == tokens or not required)
    return PathResult(name, tokens, equal, ties, prompts, required, passed)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text, without special tokens around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def normalised(tokenizer: Any, lines: Sequence[str]) -> list[str]:
    """Return the lines after the part of the tokenizer's normaliser that llama.cpp lacks."""
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is None or is_sentencepiece(json.loads(backend.to_str())):
        return list(lines)
    return [str(backend.normalizer.normalize_str(line)) for line in lines]


def compare_lines(
    name: str, ids: Sequence[list[int]], tokenizer: Any, lines: Sequence[str]
) -> TokenizerResult:
    """Compare the ids of each line with those of the tokenizer."""
    equal = sum(found == encode(tokenizer, line) for found, line in zip(ids, lines, strict=True))
    return TokenizerResult(name, len(lines), equal, passed=equal == len(lines))
