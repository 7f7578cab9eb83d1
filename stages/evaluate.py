"""Judge the teacher and any models on held-out text: `python stages/evaluate.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click
import torch

from pipeline.cli import stage
from pipeline.config import Params
from pipeline.data.corpus import load_tokenizer
from pipeline.data.rows import CorpusSplit
from pipeline.data.vocabulary import require_tokenizer
from pipeline.errors import DecantError, ParamsError
from pipeline.evaluation.compare import TEACHER, Comparison, compare
from pipeline.evaluation.harness import Harness, Results
from pipeline.evaluation.models import open_models
from pipeline.evaluation.passage import view_passage
from pipeline.evaluation.samples import sample
from pipeline.evaluation.tables import comparison_lines, harness_lines
from pipeline.files import write_json, write_text
from pipeline.runtime.device import dtype_name, inference_dtype, pick_device
from pipeline.teacher.hf import HuggingFaceTeacher

DEFAULT_RUNS = ("student", "baseline")


@stage
@click.option(
    "--run",
    "runs",
    multiple=True,
    help="A run under paths.runs to judge; may be repeated.  [default: student and baseline, where "
    "neither --run nor --model is given]",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=FOLDER",
    help="Any Hugging Face folder to judge; may be repeated.",
)
@click.option(
    "--lm-eval",
    "tasks",
    metavar="TASKS",
    help="Tasks of lm-evaluation-harness to run besides, separated by commas.",
)
@click.option(
    "--lm-eval-folder",
    type=click.Path(path_type=Path),
    help="A folder with task files (.yaml) of your own.",
)
@click.option(
    "--lm-eval-shots",
    type=click.IntRange(min=0),
    help="Examples before each question.  [default: as the task says]",
)
@click.option(
    "--lm-eval-limit", type=click.IntRange(min=1), help="Questions of each task.  [default: all]"
)
def main(
    params: Params,
    runs: tuple[str, ...],
    models: tuple[str, ...],
    tasks: str | None,
    lm_eval_folder: Path | None,
    lm_eval_shots: int | None,
    lm_eval_limit: int | None,
) -> None:
    """Judge teacher and models on all validation rows against the live teacher.

    Validation loss, perplexity, KL to the teacher over the whole vocabulary, top-1 agreement and
    accuracy with 95 % intervals, expected calibration error. Reads evaluate.*, paths.teacher,
    paths.corpus and the models' folders; writes paths.evaluate/metrics.json, calibration.json,
    samples.json and passage.json, and with --lm-eval lm_eval.json, which is removed otherwise,
    since it would tell of other models.
    """
    folders = name_folders(params.paths.runs, runs, models)
    harness = None
    if tasks is not None:
        harness = Harness(
            tasks.split(","), folder=lm_eval_folder, shots=lm_eval_shots, limit=lm_eval_limit
        )
    elif any(option is not None for option in (lm_eval_folder, lm_eval_shots, lm_eval_limit)):
        raise ParamsError("--lm-eval-folder, -shots and -limit say how: name tasks by --lm-eval")
    device = pick_device(params.device)
    dtype = inference_dtype(params.evaluate.dtype, device, key="evaluate.dtype")
    comparison = judge(params, folders, dtype, device)
    for line in comparison_lines(comparison):
        click.echo(line)
    (params.paths.evaluate / "lm_eval.json").unlink(missing_ok=True)
    if harness is not None:
        run_harness(harness, params, {TEACHER: params.paths.teacher, **folders}, dtype, device)
    tokens = comparison.scores[TEACHER].tokens
    click.echo(f"evaluate: {len(folders) + 1} models on {tokens:,} tokens in {dtype_name(dtype)}")


def name_folders(place: Path, runs: Sequence[str], models: Sequence[str]) -> dict[str, Path]:
    """What is to be judged, by name.

    Raises:
        ParamsError: a --model without a name, or a name twice.
        DecantError: no such folder.
    """
    if not runs and not models:
        runs = DEFAULT_RUNS
    named = [(run, place / run / "model", f"run stages/train.py --run {run} first") for run in runs]
    for text in models:
        name, has_folder, place_of_model = text.partition("=")
        if not (name and has_folder and place_of_model):
            raise ParamsError(f"--model {text} is not of the form NAME=FOLDER: give it a name")
        named.append((name, Path(place_of_model), "name a model folder by --model NAME=FOLDER"))
    folders: dict[str, Path] = {}
    for name, folder, remedy in named:
        if name in folders or name == TEACHER:
            raise ParamsError(f"two models are called {name}: give each a name of its own")
        if not folder.is_dir():
            raise DecantError(f"{folder} does not exist: {remedy}")
        folders[name] = folder
    return folders


def judge(
    params: Params, folders: Mapping[str, Path], dtype: torch.dtype, device: torch.device
) -> Comparison:
    """Compare, look at a passage and at samples, and write all that."""
    corpus = CorpusSplit(params.paths.corpus, "validation")
    require_tokenizer(params.paths.teacher, corpus)
    models = open_models(folders, corpus, params.paths.teacher, dtype=dtype, device=device)
    teacher = HuggingFaceTeacher(
        params.paths.teacher, vocab_size=corpus.info.vocab_size, dtype=dtype, device=device
    )
    comparison = compare(teacher, models, corpus, params.evaluate, params.prepare.attention)
    tokenizer = load_tokenizer(params.paths.teacher)
    length = params.evaluate.passage_tokens
    passage = view_passage(teacher, models, corpus, tokenizer, length)
    del teacher, models  # samples are made by others, and may need the room
    continuations = {
        name: sample(folder, params.evaluate.prompts, params.evaluate.new_tokens)
        for name, folder in {TEACHER: params.paths.teacher, **folders}.items()
    }
    metrics = {
        name: asdict(scores) | {"parameters": comparison.parameters[name]}
        for name, scores in comparison.scores.items()
    }
    calibration = [
        {"model": name, **point}
        for name, points in comparison.calibration.items()
        for point in points
    ]
    samples = {"prompts": params.evaluate.prompts, "continuations": continuations}
    target = params.paths.evaluate
    write_json(target / "metrics.json", metrics)
    write_json(target / "calibration.json", calibration)
    write_json(target / "samples.json", samples)
    write_text(target / "passage.json", json.dumps(passage, ensure_ascii=False) + "\n")
    return comparison


def run_harness(
    harness: Harness,
    params: Params,
    folders: Mapping[str, Path],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Run the harness on each model; what is finished is written at once."""
    results: dict[str, Results] = {}
    for name, folder in folders.items():
        results[name] = harness.run(
            folder, dtype=dtype, device=device, batch_rows=params.evaluate.batch_rows
        )
        write_json(params.paths.evaluate / "lm_eval.json", results)
        for line in harness_lines(name, results[name]):
            click.echo(line)


if __name__ == "__main__":
    main()
