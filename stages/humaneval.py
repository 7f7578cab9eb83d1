"""Let models write the programs of HumanEval, and run them: `python stages/humaneval.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.cli import stage
from pipeline.errors import printable

if TYPE_CHECKING:
    from pipeline.config.params import Params
    from pipeline.evaluation.results import HumanEvalScores


@stage
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=FOLDER",
    help="A Hugging Face folder of type qwen2, qwen3 or llama; may be repeated.",
)
@click.option(
    "--run",
    "runs",
    multiple=True,
    help="A run under paths.runs; may be repeated.  [default: teacher and the run student]",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace samples that were made with other parameters."
)
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
    from pipeline.evaluation.completions import evaluate_model
    from pipeline.evaluation.humaneval import keep_scores, load_problems
    from pipeline.evaluation.sandbox import require_sandbox
    from pipeline.generation.text_generator import TextGenerator
    from pipeline.model.model_dtype import model_dtype
    from pipeline.model.named_models import name_models
    from pipeline.runtime.console import announce
    from pipeline.runtime.device import describe_dtypes, pick_device

    if models or runs:
        folders = name_models(params.paths, runs, models)
    else:
        folders = name_models(params.paths, ["student"], [], teacher="teacher")
    problems = load_problems(params.humaneval.problems)
    if not unsandboxed:
        require_sandbox()
    device = pick_device(params.device)
    dtypes = {
        name: model_dtype(params.humaneval.dtype, folder, device, key="humaneval.dtype")
        for name, folder in folders.items()
    }
    announce(
        "humaneval",
        f"{params.humaneval.samples} x {len(problems)} programs of up to "
        f"{params.humaneval.max_new_tokens} tokens by {', '.join(folders)}, in "
        f"{describe_dtypes(dtypes)}",
    )
    click.echo(f"  {'model':12} {'pass@1':>7} {'95 %':>14} {'tokens/s':>9}  programs")
    for name, folder in folders.items():
        scores = evaluate_model(
            TextGenerator(folder, device=device, dtype=dtypes[name]),
            problems,
            params.humaneval,
            params.paths.humaneval / name,
            seed=params.seed,
            isolated=not unsandboxed,
            overwrite=overwrite,
        )
        keep_scores(params.paths.humaneval / "metrics.json", name, scores)
        _show(name, scores)
    click.echo(
        f"humaneval: {len(folders)} models on {len(problems)} problems, "
        f"{params.humaneval.samples} samples each, in {describe_dtypes(dtypes)}; "
        f"{params.paths.humaneval / 'metrics.json'}"
    )


def _show(name: str, scores: HumanEvalScores) -> None:
    """One line of the table."""
    between = f"{scores.interval.low:.1%}..{scores.interval.high:.1%}"
    statuses = ", ".join(f"{count} {status}" for status, count in scores.statuses.items())
    click.echo(
        f"  {printable(name):12} {scores.pass_at['1']:7.1%} {between:>14} "
        f"{scores.tokens_per_second:9.1f}  {statuses}"
    )


if __name__ == "__main__":
    main()
