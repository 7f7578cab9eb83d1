"""Fetch the teacher and its tokenizer: `python stages/fetch.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.cli import stage
from pipeline.errors import printable

if TYPE_CHECKING:
    from pipeline.config.params import Params


@stage
def main(params: Params) -> None:
    """Fetch the teacher and its tokenizer, as a Hugging Face folder.

    A folder, and what the hub's library keeps, are used where they lie. The only stage that touches
    the network. Reads teacher.*; writes paths.teacher.
    """
    from pipeline.io.hashes import SEEN_TEACHER
    from pipeline.model.config_json import describe
    from pipeline.teacher.fetch import fetch_teacher

    seen = params.paths.inputs / SEEN_TEACHER
    model = fetch_teacher(params.teacher, params.paths.teacher, seen)
    verb = "holds" if model == params.paths.teacher else f"points to {model},"
    click.echo(f"fetch: {params.paths.teacher} {verb} {printable(describe(model))}")


if __name__ == "__main__":
    main()
