"""Rollouts: a model's continuations of prompts, written as a corpus for on-policy distillation.

On-policy distillation trains the student on texts that the student itself has written, so that it
learns from the teacher in the states that it reaches by its own tokens (Agarwal et al. 2024). Done
offline (Lightning OPD, Wu et al. 2026, arXiv 2604.13010), the rollouts are written once, and the
teacher scores them once, before training:

    rollouts    this module: prompts -> paths.rollouts/corpus.zarr
    prepare     the teacher's top-K at each sampled token
    train       train.divergence=reverse_kl on them

A document of the corpus is a prompt and one rollout, token by token as sampled: decoding the text
and tokenizing it again could give other tokens than those that the student chose. Only sampled
tokens are in the loss, with the token that ended the text; a rollout that was cut at
rollouts.max_new_tokens has none. Rows hold whole documents (best_fit).

Each rollout depends on (seed, prompt, sample) and the model alone, and beyond rounding not on the
batch in which it is written. Batches are added to a journal (pipeline/io/journal.py) as they are
finished, and the corpus is made from the journal at the end, so a process that was stopped goes on
where it was.

Why there is no loss on the sampled token alone. Lightning OPD, like the on-policy distillation of
Thinking Machines (2025), scores a rollout by A = log p(y) - log q(y) at each sampled token y and
follows A times the gradient of log q(y). Under y ~ q that is minus the gradient of KL(q || p) at
this position, estimated from one sample. The cache holds more: the teacher's top K and the mass of
the rest, so `reverse_kl` computes the expectation over the K + 1 outcomes instead of sampling it,
which removes the noise of the sample. Unknown to it is how the tail is spread within itself, a bias
where the student has much mass there. tests/benchmarks/on_policy.py compares both with the gradient
over the whole vocabulary: with a student close to its teacher (0.01 nats) the bucket's cosine is
0.9999; with the demo's (1.4 nats) it is 0.72 to 0.81, better than the sampled tokens' up to about
1,000 tokens per step, and worse beyond (docs/benchmarks.md). Moreover

- q is the student of the present step in `reverse_kl`, so no importance ratio is needed when the
  student has moved away from the one that wrote the rollouts; a sampled token needs one, and the
  log-probability of that token when it was sampled;
- y may lie outside the teacher's top K, just where the student is wrong, so log p(y) would be
  another array of the cache, with checks of its own.

Top-K reverse KL without a bucket for the tail is unstable, because a student lowers it by moving
mass out of the K ids (verl, pull request 5041). With the bucket, that mass has its price.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.params import Params
from pipeline.config.source_params import RolloutsParams
from pipeline.data.corpus import num_ids
from pipeline.data.corpus_writer import SplitWriter
from pipeline.data.corpus_zarr import (
    ROLLOUTS,
    SPLITS,
    SplitInfo,
    digest_of_tokens,
    read_made_from,
)
from pipeline.data.document_tokenizer import leading_tokens
from pipeline.data.packing import Document, best_fit
from pipeline.data.text_hashes import is_there, write_made_from
from pipeline.data.vocabulary import require_same_vocabulary
from pipeline.errors import DecantError
from pipeline.generation.rollout_models import (
    RolloutModel,
    VllmRollouts,
    context_of,
    open_rollout_model,
)
from pipeline.generation.rollout_prompts import (
    RolloutPrompts,
    read_rollout_prompts,
)
from pipeline.generation.sampling import GenerationSettings
from pipeline.generation.text_generator import default_eos_ids, folder_defaults
from pipeline.io.folders import open_folder
from pipeline.io.journal import Journal
from pipeline.model.config_json import embedding_rows
from pipeline.model.folder import POINTER, hash_tokenizer, hash_weights, teacher_folder
from pipeline.model.quantization import describe_weights, read_quantization
from pipeline.model.tokenizer import load_tokenizer
from pipeline.runtime.console import announce, progress, say
from pipeline.runtime.device import dtype_name
from pipeline.teacher.vllm import describe_vllm

CORPUS, JOURNAL = "corpus.zarr", "rollouts.jsonl"
"""What lies in paths.rollouts."""

_ROWS_AT_ONCE = 1024  # in memory; the larger the buffer, the better the fit

Request = tuple[int, int]  # the number of the prompt, and of the sample


@dataclass(frozen=True)
class Rollouts:
    """The result: the corpus, and counts of what was written.

    Attributes:
        splits: the description of each split.
        num_rollouts, num_tokens: all rollouts, and their sampled tokens.
        num_ended: rollouts that ended by themselves.
        new_tokens, seconds: what this process sampled, and how long that took.
        example: a prompt and its rollout, as text.
    """

    corpus: Path
    splits: dict[str, SplitInfo]
    num_rollouts: int
    num_tokens: int
    num_ended: int
    new_tokens: int
    seconds: float
    example: tuple[str, str]


def make_rollouts(
    params: Params,
    model_folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    overwrite: bool = False,
) -> Rollouts | None:
    """Let a model continue the prompts of rollouts.*, and write the corpus.

    Args:
        model_folder: the model that writes; its ids must be the teacher's.
        overwrite: discard rollouts that were made from other inputs, instead of refusing.

    Returns:
        None if the corpus is there and was made from the same inputs.

    Raises:
        MismatchError: the model's ids are not the teacher's, or there are rollouts made from other
            inputs.
        DecantError, ParamsError: see `read_rollout_prompts`, `open_rollout_model`, `VllmRollouts`.
    """
    chosen, folder = params.rollouts, params.paths.rollouts
    teacher = teacher_folder(params.paths.teacher)
    tokenizer = load_tokenizer(teacher)
    ids = num_ids(tokenizer, teacher)
    _require_ids(model_folder, teacher, ids)
    ends = end_ids(model_folder, tokenizer, ids)
    longest = min(chosen.row_length, context_of(model_folder) or chosen.row_length)
    prompts = read_rollout_prompts(chosen, tokenizer, longest)
    fingerprint = {
        "model": hash_weights(model_folder),
        "tokenizer": hash_tokenizer(teacher),
        "prompts": prompts.sha256,
        **chosen.model_dump(include={"samples", "max_new_tokens", "temperature", "top_p"}),
        "seed": params.seed if chosen.temperature else None,
        "ends": list(ends),
        "dtype": dtype_name(dtype),
        "device": device.type,
        "engine": _describe_engine(params, model_folder),
    }
    made_from = {
        ROLLOUTS: fingerprint
        | {"row_length": chosen.row_length, "validation_fraction": chosen.validation_fraction}
    }
    address = folder / CORPUS
    if is_there(address) and read_made_from(address) == made_from:
        announce("rollouts", f"has nothing to do: {address} was made from the same inputs")
        return None
    announce(
        "rollouts",
        f"{len(prompts.ids) * chosen.samples:,} rollouts of up to {chosen.max_new_tokens} tokens, "
        f"{chosen.samples} for each of {len(prompts.ids):,} prompts, by {model_folder} at "
        f"temperature {chosen.temperature:g} in {dtype_name(dtype)}",
    )
    for line in prompts.left_out():
        say(f"rollouts: {line}")
    if not ends:
        say("rollouts: warning: no token ends a text of this model, so each rollout is cut")
    settings = GenerationSettings(
        max_new_tokens=chosen.max_new_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        eos_ids=ends,
        num_ids=ids,
    )
    with Journal(
        folder / JOURNAL, fingerprint, key="paths.rollouts", overwrite=overwrite
    ) as journal:
        before, seconds = len(journal.lines), 0.0
        if before < len(prompts.ids) * chosen.samples:
            model = _open(params, model_folder, dtype, device)
            started = time.perf_counter()
            _write(model, prompts.ids, settings, chosen, params.seed, journal)
            seconds = time.perf_counter() - started
        new_tokens = sum(len(line["ids"]) for line in journal.lines[before:])
        written = {(line["prompt"], line["sample"]): line["ids"] for line in journal.lines}
    splits = _write_corpus(address, chosen, prompts, written, tokenizer, teacher, ends)
    write_made_from(address, made_from)
    first = min(written)
    return Rollouts(
        corpus=address,
        splits=splits,
        num_rollouts=len(written),
        num_tokens=sum(map(len, written.values())),
        num_ended=sum(new[-1] in ends for new in written.values()),
        new_tokens=new_tokens,
        seconds=seconds,
        example=(tokenizer.decode(prompts.ids[first[0]]), tokenizer.decode(written[first])),
    )


def _open(params: Params, folder: Path, dtype: torch.dtype, device: torch.device) -> RolloutModel:
    if params.rollouts.engine == "vllm":
        row_length = params.rollouts.row_length
        return VllmRollouts(
            folder, params.prepare.vllm, row_length=row_length, dtype=dtype, device=device
        )
    return open_rollout_model(folder, dtype, device, dequantize=params.prepare.dequantize)


def _describe_engine(params: Params, folder: Path) -> str:
    """Name the engine with its settings, as far as they change what is sampled."""
    quantization = read_quantization(folder)
    if params.rollouts.engine == "vllm":
        return describe_vllm(params.prepare.vllm, quantization)
    return "transformers" + describe_weights(quantization, dequantize=params.prepare.dequantize)


def _require_ids(model_folder: Path, teacher: Path, ids: int) -> None:
    """Refuse a model that does not read and write the teacher's ids."""
    require_same_vocabulary(model_folder, teacher)
    rows = embedding_rows(model_folder)
    if rows is not None and rows < ids:
        raise DecantError(
            f"{model_folder} has {rows:,} vocabulary rows, and the teacher's tokenizer {ids:,} "
            "ids: choose a model of the teacher's family"
        )


def end_ids(model_folder: Path, tokenizer: Any, ids: int) -> tuple[int, ...]:
    """Return the ids that end a rollout: the folder's, the tokenizer's, and <|endoftext|>."""
    ends = {*folder_defaults(model_folder, tokenizer)["eos_ids"], *default_eos_ids(tokenizer)}
    return tuple(sorted(end for end in ends if end < ids))


def _write(
    model: RolloutModel,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    params: RolloutsParams,
    seed: int,
    journal: Journal,
) -> None:
    """Add the rollouts that the journal lacks, batch by batch."""
    requests = [(prompt, n) for prompt in range(len(prompts)) for n in range(params.samples)]
    requests.sort(key=lambda request: len(prompts[request[0]]))  # to need little padding
    made = {(line["prompt"], line["sample"]) for line in journal.lines}
    starts = range(0, len(requests), params.batch_rows)
    for first in progress(starts, what="rollouts", unit="batch"):
        batch = [r for r in requests[first : first + params.batch_rows] if r not in made]
        if not batch:
            continue
        new = model(
            [prompts[prompt] for prompt, _ in batch],
            settings,
            rollout_uniforms(batch, settings.max_new_tokens, seed),
        )
        journal.append(
            {"prompt": prompt, "sample": sample, "ids": ids}
            for (prompt, sample), ids in zip(batch, new, strict=True)
        )


def rollout_uniforms(batch: Sequence[Request], max_new_tokens: int, seed: int) -> torch.Tensor:
    """Return the numbers in [0, 1) that decide rollouts, float64 [B, max_new_tokens]."""
    rows = [np.random.default_rng([seed, *request]).random(max_new_tokens) for request in batch]
    return torch.from_numpy(np.stack(rows))


def _write_corpus(
    address: Path,
    params: RolloutsParams,
    prompts: RolloutPrompts,
    written: Mapping[Request, list[int]],
    tokenizer: Any,
    teacher: Path,
    ends: Sequence[int],
) -> dict[str, SplitInfo]:
    """Write both splits, in the order of the prompts."""
    writers = {
        split: SplitWriter(
            address,
            split,
            row_length=params.row_length,
            vocab_size=num_ids(tokenizer, teacher),
            key="paths.rollouts",
        )
        for split in SPLITS
    }
    num_bytes = dict.fromkeys(SPLITS, 0)

    def documents(split: str) -> Iterator[Document]:
        for request, new in sorted(written.items()):
            if prompts.splits[request[0]] == split:
                before = prompts.ids[request[0]]
                ids = [*before, *new]
                num_bytes[split] += len(tokenizer.decode(ids).encode())
                writers[split].saw(digest_of_tokens(ids))
                yield Document(np.array(ids), np.arange(len(ids)) >= len(before))

    pad_id = ends[0] if ends else 0
    for split, writer in writers.items():
        for rows in best_fit(documents(split), params.row_length, pad_id, _ROWS_AT_ONCE):
            writer.add(rows)
    open_folder(address).remove(POINTER)  # a killed process must not leave the older record
    return {
        split: writer.commit(
            num_text_bytes=num_bytes[split],
            tokenizer_sha256=hash_tokenizer(teacher),
            leading_ids=tuple(leading_tokens(tokenizer, "auto")),
        )
        for split, writer in writers.items()
    }
