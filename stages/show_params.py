"""Print all parameters with what each means: `python stages/show_params.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import stage

if TYPE_CHECKING:
    from pipeline.config.params import Params


@stage
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Write them to this file, for example params.yaml.",
)
def main(params: Params, output: Path | None) -> None:
    """Print all parameters as a params file, with what each means as a comment.

    Values are those of --params and --set; keys that the file leaves out have their defaults. With
    --output params.yaml, a recipe or an own short file becomes the complete file that `dvc repro`
    needs. Reads nothing else.
    """
    from pipeline.config.params_text import params_text
    from pipeline.io.files import write_text

    text = params_text(params)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_text(output, text)
        click.echo(f"show_params: wrote {output}")


if __name__ == "__main__":
    main()
