"""Evaluate the teacher and any models on held-out text: `python stages/evaluate.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import stage, writes
from pipeline.errors import ParamsError, printable
from pipeline.teacher.stage_ranks import shares_teacher

if TYPE_CHECKING:
    from pipeline.config.params import Params

DEFAULT_RUNS = ("student", "baseline")


@stage
@shares_teacher
@writes("evaluate")
@click.option(
    "--run",
    "runs",
    multiple=True,
    help="A run under paths.runs to evaluate; may be repeated.  [default: student and baseline, "
    "where neither --run nor --model is given]",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=FOLDER",
    help="Any Hugging Face folder to evaluate; may be repeated.",
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
    from pipeline.evaluation.harness import Harness
    from pipeline.evaluation.judge import choose_dtypes, judge, run_harness
    from pipeline.evaluation.results import TEACHER
    from pipeline.evaluation.tables import comparison_lines
    from pipeline.model.named_models import name_models
    from pipeline.runtime.device import describe_dtypes, pick_device

    if not runs and not models:
        runs = DEFAULT_RUNS
    folders = name_models(params.paths, runs, models, teacher=TEACHER)
    harness = None
    if tasks is not None:
        harness = Harness(
            tasks.split(","), folder=lm_eval_folder, shots=lm_eval_shots, limit=lm_eval_limit
        )
    elif any(option is not None for option in (lm_eval_folder, lm_eval_shots, lm_eval_limit)):
        raise ParamsError("--lm-eval-folder, -shots and -limit say how: name tasks by --lm-eval")
    device = pick_device(params.device)
    dtypes = choose_dtypes(params, folders, device)
    comparison = judge(params, folders, dtypes, device)
    for line in comparison_lines(comparison):
        click.echo(printable(line))
    (params.paths.evaluate / "lm_eval.json").unlink(missing_ok=True)
    if harness is not None:
        run_harness(harness, params, folders, dtypes, device)
    tokens = comparison.scores[TEACHER].tokens
    click.echo(f"evaluate: {len(folders)} models on {tokens:,} tokens in {describe_dtypes(dtypes)}")


if __name__ == "__main__":
    main()
