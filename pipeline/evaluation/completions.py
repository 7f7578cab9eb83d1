"""Let a model write programs and run them in the sandbox; both can be stopped and resumed.

A model's folder under paths.humaneval holds two journals (`journal.py`): samples.jsonl, one line
per program, and results.jsonl, one line per program that was run, by its sha256. Samples are
generated in batches of prompts of similar length. The composition and seed of a batch depend only
on the settings, so a run that was stopped ends with the samples it would have had: a batch with
missing samples is generated again. (On a GPU, or with another number of threads, rounding can
decide a near tie differently.)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from os import cpu_count
from pathlib import Path
from platform import python_version
from typing import Any

from pipeline.config.delivery_params import HumanevalParams
from pipeline.data.document_tokenizer import document_separator
from pipeline.evaluation.humaneval import STOP, Problem, hash_problems, summarise
from pipeline.evaluation.results import HumanEvalScores
from pipeline.evaluation.sandbox import Limits, Outcome, run_program
from pipeline.evaluation.stop import complete
from pipeline.generation.sampling import GenerationSettings
from pipeline.generation.text_generator import TextGenerator
from pipeline.io.journal import Journal
from pipeline.model.folder import hash_tokenizer, hash_weights
from pipeline.runtime.console import progress
from pipeline.runtime.device import dtype_name

Request = tuple[Problem, int]  # the problem, and the number of the sample


def evaluate_model(
    generator: TextGenerator,
    problems: Sequence[Problem],
    params: HumanevalParams,
    folder: Path,
    *,
    seed: int,
    isolated: bool = True,
    overwrite: bool = False,
) -> HumanEvalScores:
    """Write programs for all problems, run them, and score them.

    Args:
        folder: folder of the journals.
        seed: seed of the draws, used if temperature is not 0.
        isolated: run programs in the sandbox.
        overwrite: discard samples made with other settings.

    Raises:
        ParamsError: a prompt does not fit the model's context.
        MismatchError: the folder holds samples of another model or other settings.
    """
    fingerprint = fingerprint_of(generator, problems, params, seed)
    limits = asdict(_limits(params)) | {"isolated": isolated, "python": python_version()}
    journal = partial(Journal, key="paths.humaneval")
    with journal(folder / "samples.jsonl", fingerprint, overwrite=overwrite) as samples:
        write_samples(generator, problems, params, seed, samples)
        with journal(folder / "results.jsonl", fingerprint | limits, overwrite=True) as results:
            statuses = run_samples(problems, params, samples, results, isolated=isolated)
    seconds = sum(line["seconds"] for line in samples.lines)
    tokens = sum(line["tokens"] for line in samples.lines)
    return HumanEvalScores(
        **summarise(statuses, params.ks),
        temperature=params.temperature,
        tokens_per_second=tokens / max(seconds, 1e-9),
        new_tokens=tokens,
        model_sha256=fingerprint["weights"],
    )


def fingerprint_of(
    generator: TextGenerator, problems: Sequence[Problem], params: HumanevalParams, seed: int
) -> dict[str, Any]:
    """Return all that the samples depend on, the keys most useful in an error message first."""
    weight = generator.student.head_weight
    chosen = params.model_dump(include={"samples", "temperature", "max_new_tokens", "batch_rows"})
    if params.temperature:
        chosen |= {"top_p": params.top_p, "seed": seed}
    return {
        "weights": hash_weights(generator.folder),
        "tokenizer": hash_tokenizer(generator.folder),
        "problems": hash_problems(problems),
        **chosen,
        "dtype": dtype_name(generator.dtype),
        "device": weight.device.type,
        "ends": sorted(_end_ids(generator)),
        "stop": list(STOP),
    }


def write_samples(
    generator: TextGenerator,
    problems: Sequence[Problem],
    params: HumanevalParams,
    seed: int,
    journal: Journal,
) -> None:
    """Add the samples that the journal lacks, batch by batch."""
    settings = GenerationSettings(
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=0,
        repetition_penalty=1.0,
        eos_ids=_end_ids(generator),
    )
    prompts = {p.task_id: generator.encode(p.prompt, settings, p.task_id) for p in problems}
    requests = [(problem, n) for problem in problems for n in range(params.samples)]
    requests.sort(key=lambda request: len(prompts[request[0].task_id]))  # to need little padding
    made = {(line["task_id"], line["sample"]) for line in journal.lines}
    starts = range(0, len(requests), params.batch_rows)
    for first in progress(starts, what=f"programs of {journal.file.parent.name}", unit="batch"):
        batch = requests[first : first + params.batch_rows]
        if made.issuperset((problem.task_id, n) for problem, n in batch):
            continue
        started = time.perf_counter()
        rows = [prompts[problem.task_id] for problem, _ in batch]
        texts = complete(generator, rows, replace(settings, seed=seed + first), STOP)
        seconds = (time.perf_counter() - started) / len(batch)
        lines = _sample_lines(batch, texts, seconds)
        journal.append(line for line in lines if (line["task_id"], line["sample"]) not in made)


def _sample_lines(
    batch: Sequence[Request], texts: Sequence[tuple[str, int]], seconds: float
) -> list[dict[str, Any]]:
    return [
        {
            "task_id": problem.task_id,
            "sample": number,
            "completion": text,
            "tokens": tokens,
            "seconds": seconds,
        }
        for (problem, number), (text, tokens) in zip(batch, texts, strict=True)
    ]


def run_samples(
    problems: Sequence[Problem],
    params: HumanevalParams,
    samples: Journal,
    results: Journal,
    *,
    isolated: bool = True,
) -> dict[str, list[str]]:
    """Run every program that has no result yet; return the statuses of each problem's samples.

    Identical programs are run once.
    """
    by_id = {problem.task_id: problem for problem in problems}
    programs = {
        (line["task_id"], line["sample"]): by_id[line["task_id"]].program(line["completion"])
        for line in samples.lines
    }
    found = {line["program"]: line["status"] for line in results.lines}
    missing = {_hash(p): p for p in programs.values() if _hash(p) not in found}
    limits = _limits(params)
    pool = ThreadPoolExecutor(params.workers or cpu_count() or 1)
    try:
        running: dict[Future[Outcome], str] = {
            pool.submit(run_program, program, limits, isolated=isolated): name
            for name, program in missing.items()
        }
        ended = progress(as_completed(running), what="runs", unit="program", total=len(running))
        for future in ended:
            outcome, name = future.result(), running[future]
            found[name] = outcome.status
            line = {"program": name, "status": outcome.status, "detail": outcome.detail}
            results.append([line])
    finally:
        pool.shutdown(cancel_futures=True)
    return {
        problem.task_id: [found[_hash(programs[problem.task_id, n])] for n in range(params.samples)]
        for problem in problems
    }


def _limits(params: HumanevalParams) -> Limits:
    return Limits(seconds=params.timeout, memory=params.memory * 2**20)


def _hash(program: str) -> str:
    return hashlib.sha256(program.encode("utf-8", "surrogatepass")).hexdigest()


def _end_ids(generator: TextGenerator) -> tuple[int, ...]:
    """Return the folder's eos ids and the document separator (a chat model's eos ends a turn)."""
    return tuple({*generator.defaults["eos_ids"], document_separator(generator.tokenizer)})
