"""Let models write programs and run them: `python stages/humaneval.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline.cli import stage
from pipeline.config import Params
from pipeline.errors import DecantError, ParamsError
from pipeline.evaluation.completions import evaluate_model
from pipeline.evaluation.humaneval import load_problems
from pipeline.evaluation.sandbox import probe
from pipeline.files import names_one_folder, write_json
from pipeline.runtime.device import dtype_name, inference_dtype, pick_device
from pipeline.text_generator import TextGenerator


@stage
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=FOLDER",
    help="A Hugging Face folder of type qwen2 or llama; may be repeated.",
)
@click.option(
    "--run",
    "runs",
    multiple=True,
    help="A run under paths.runs; may be repeated.  [default: teacher and the run student]",
)
@click.option("--overwrite", is_flag=True, help="Start again where other samples are in the way.")
@click.option(
    "--unsandboxed",
    is_flag=True,
    help="Run programs with your files, network and rights: for models that you trust.",
)
def main(
    params: Params,
    models: tuple[str, ...],
    runs: tuple[str, ...],
    overwrite: bool,
    unsandboxed: bool,
) -> None:
    """HumanEval: let models write functions from their docstrings, and run their tests.

    Programs run in a sandbox of Linux namespaces, which is tried first; where it does not hold, the
    stage refuses. A run that was stopped is continued. Reads humaneval.*, seed and model folders;
    writes paths.humaneval/metrics.json, beside what other models have there, and each model's
    programs and results. Run by hand; no other stage depends on it.
    """
    folders = choose_folders(params, models, runs)
    problems = load_problems(params.humaneval.problems)
    if not unsandboxed:
        require_sandbox()
    device = pick_device(params.device)
    dtype = inference_dtype(params.humaneval.dtype, device, key="humaneval.dtype")
    click.echo(f"  {'model':12} {'pass@1':>7} {'95 %':>14} {'tokens/s':>9}  programs")
    for name, folder in folders.items():
        scores = evaluate_model(
            TextGenerator(folder, device=device, dtype=dtype),
            problems,
            params.humaneval,
            params.paths.humaneval / name,
            seed=params.seed,
            isolated=not unsandboxed,
            overwrite=overwrite,
        )
        keep(params.paths.humaneval / "metrics.json", name, scores)
        show(name, scores)
    click.echo(
        f"humaneval: {len(folders)} models on {len(problems)} problems, "
        f"{params.humaneval.samples} samples each, in {dtype_name(dtype)}; "
        f"{params.paths.humaneval / 'metrics.json'}"
    )


def choose_folders(
    params: Params, models: tuple[str, ...], runs: tuple[str, ...]
) -> dict[str, Path]:
    """Folder by name, of what was asked for, or of teacher and student.

    Raises:
        ParamsError: a --model that is not NAME=FOLDER, a name that cannot be a folder's, or a name
            twice.
        DecantError: a folder that is not there.
    """
    named: list[tuple[str, Path]] = []
    for text in models:
        name, _, place = text.partition("=")
        if not place or not names_one_folder(name):
            raise ParamsError(f"--model {text!r} is not NAME=FOLDER with a plain name: give both")
        named.append((name, Path(place)))
    if not models and not runs:
        named, runs = [("teacher", params.paths.teacher)], ("student",)
    for run in runs:
        if not names_one_folder(run):
            raise ParamsError(f"--run {run!r} is no plain name: give a run's own, without slashes")
        named.append((run, params.paths.runs / run / "model"))
    folders: dict[str, Path] = {}
    for name, folder in named:
        if name in folders:
            raise ParamsError(f"two models are called {name}: give each a name of its own")
        folders[name] = folder
        if not (folder / "config.json").is_file():
            raise DecantError(
                f"{folder} holds no model for {name}: run stages/fetch.py for the teacher, "
                "stages/train.py --run NAME for a run, or name a folder by --model NAME=FOLDER"
            )
    return folders


def require_sandbox() -> None:
    """Raises DecantError where the sandbox does not hold on this machine."""
    if reason := probe():
        raise DecantError(
            f"programs written by a model would not be contained here: {reason}; for models that "
            "you trust, --unsandboxed runs them with your own rights"
        )


def keep(file: Path, name: str, scores: dict[str, Any]) -> None:
    """Put a model's scores beside those of others."""
    try:
        metrics = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise DecantError(f"{file} cannot be read as JSON ({error}): remove it") from None
    if not isinstance(metrics, dict):
        raise DecantError(f"{file} holds no scores by model: remove it")
    write_json(file, metrics | {name: scores})


def show(name: str, scores: dict[str, Any]) -> None:
    """One line of the table."""
    low, high = scores["interval"]["low"], scores["interval"]["high"]
    between = f"{low:.1%}..{high:.1%}"
    statuses = ", ".join(f"{count} {status}" for status, count in scores["statuses"].items())
    click.echo(
        f"  {name:12} {scores['pass_at']['1']:7.1%} {between:>14} "
        f"{scores['tokens_per_second']:9.1f}  {statuses}"
    )


if __name__ == "__main__":
    main()
