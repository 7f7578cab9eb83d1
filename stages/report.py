"""One HTML page about the run: `python stages/report.py`."""

from __future__ import annotations

import json

import click

from pipeline.cli import stage
from pipeline.config import Params
from pipeline.report import markdown_table, write_report


@stage
def main(params: Params) -> None:
    """Write one self-contained HTML page: curves, gate, comparison, calibration, samples.

    Reads what verify, train and evaluate wrote; writes paths.report/index.html and prints the
    comparison as a Markdown table.
    """
    page = write_report(params)
    scores = json.loads((params.paths.evaluate / "metrics.json").read_text())
    click.echo(markdown_table(scores))
    click.echo(f"report: {page}")


if __name__ == "__main__":
    main()
