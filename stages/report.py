"""Write one HTML page about the run: `python stages/report.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.cli import stage, writes
from pipeline.errors import DecantError, printable

if TYPE_CHECKING:
    from pipeline.config.params import Params
    from pipeline.report.sweep import SweepRun


@stage
@writes("report")
@click.option(
    "--sweep",
    is_flag=True,
    help="Compare all finished runs under paths.runs and DVC's experiments over this commit.",
)
def main(params: Params, sweep: bool) -> None:
    """Write one self-contained HTML page: what was distilled, how well, and how it was checked.

    Reads what prepare, verify, train and evaluate wrote, and what humaneval and export did where
    they have run; writes paths.report/index.html and prints the comparison as a Markdown table,
    and with --sweep another of the runs.
    """
    from pipeline.report import read_scores, scores_markdown, write_report
    from pipeline.report.sweep import sweep_markdown, sweep_rows

    runs = _runs(params) if sweep else []
    page = write_report(params, runs)
    click.echo(printable(scores_markdown(read_scores(params.paths))))
    if runs:
        click.echo(printable(sweep_markdown(sweep_rows(runs))))
    click.echo(f"report: {page}")


def _runs(params: Params) -> list[SweepRun]:
    """Runs made by hand, and experiments where DVC has any."""
    from pipeline.report.sweep import dvc_experiments, folder_runs

    runs = folder_runs(params.paths)
    try:
        runs += dvc_experiments(params.paths)
    except DecantError as error:
        click.echo(f"  the sweep is without DVC's experiments: {printable(str(error))}")
    if not runs:
        raise DecantError(f"{params.paths.runs} holds no finished run: run stages/train.py first")
    return runs


if __name__ == "__main__":
    main()
