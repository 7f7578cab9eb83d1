"""Bring the teacher and its tokenizer to a local folder: `python stages/fetch.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.cli import stage

if TYPE_CHECKING:
    from pipeline.config import Params


@stage
def main(params: Params) -> None:
    """Bring the teacher and its tokenizer to a local Hugging Face folder.

    The only stage that touches the network. Reads teacher.*; writes paths.teacher.
    """
    from pipeline.model.config import describe
    from pipeline.teacher.fetch import fetch_teacher

    fetch_teacher(params.teacher, params.paths.teacher)
    click.echo(f"fetch: {params.paths.teacher} holds {describe(params.paths.teacher)}")


if __name__ == "__main__":
    main()
