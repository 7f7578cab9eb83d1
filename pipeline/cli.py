"""What all stages share: --params, --set, errors as one sentence, Ctrl-C.

A stage is a click command that receives checked `Params` first:

    @stage
    def main(params: Params) -> None:
        from pipeline.data.corpus import build_corpus
        ...

It imports what it runs inside its functions, so that --help and a mistake among the parameters need
not wait for PyTorch and its like (tests/test_stages.py names them).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.errors import DecantError, OtherRankError, accident
from pipeline.runtime.launch import launch

_INTERRUPTED = 130


def stage(function: Callable[..., None]) -> click.Command:
    """Make a function (params, **options) a command; its docstring is the help text.

    Exit status: 0 done, 1 failed, 2 the request was wrong, 130 interrupted.
    """

    @click.option(
        "--params",
        "file",
        type=click.Path(path_type=Path),
        default=Path("params.yaml"),
        show_default=True,
        help="The file of all parameters.",
    )
    @click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change a parameter for this run, as `dvc exp run -S` does; may be repeated.",
    )
    @functools.wraps(function)
    def run(file: Path, overrides: tuple[str, ...], **options: Any) -> None:
        from pipeline.config import load_params

        try:
            function(load_params(file, overrides), **options)
        except OtherRankError as error:
            sys.exit(error.exit_code)
        except DecantError as error:
            _stop(str(error), error.exit_code)
        except KeyboardInterrupt:
            _stop("interrupted: run the same command to continue", _INTERRUPTED)
        except OSError as error:
            what = accident(error)
            if what is None:
                raise
            where = f"{error.filename}: " if error.filename else ""
            _stop(f"{where}{what}; mend that and run the same command again", 1)

    return click.command(context_settings={"show_default": True, "max_content_width": 100})(run)


def _stop(sentence: str, code: int) -> None:
    here = launch()
    who = f"rank {here.rank}: " if here and here.ranks > 1 else ""
    if not (who and code == _INTERRUPTED and here and here.rank):  # ranks stop together
        click.echo(f"error: {who}{sentence}", err=True)
    sys.stdout.flush()
    sys.exit(code)
