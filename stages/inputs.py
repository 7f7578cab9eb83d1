"""Hash what lies outside the pipeline, for DVC: `python stages/inputs.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.cli import stage

if TYPE_CHECKING:
    from pipeline.config.params import Params


@stage
def main(params: Params) -> None:
    """Hash the teacher's source and the corpus's text, so that DVC sees when they change.

    `dvc repro` runs this each time. By hand it is not needed: fetch and corpus look themselves.
    Reads teacher.* and corpus.*; writes paths.inputs.
    """
    from pipeline.inputs import write_inputs

    changed = write_inputs(params)
    said = f"{' and '.join(changed)} changed" if changed else "nothing has changed"
    click.echo(f"inputs: {said}")


if __name__ == "__main__":
    main()
