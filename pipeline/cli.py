"""The parts that all stages share: --params, --set, errors as one sentence, Ctrl-C.

A stage is a click command whose first argument is the validated `Params`:

    @stage
    def main(params: Params) -> None:
        from pipeline.data.corpus import build_corpus
        ...

A stage imports the code that it runs inside its functions, so that --help and errors in parameters
do not wait for PyTorch and other slow imports (tests/test_stages.py names them).
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import (
    DecantError,
    OtherRankError,
    accident,
    is_full,
    memory_shortage,
    place_of,
    printable,
)
from pipeline.runtime.launch import launch

if TYPE_CHECKING:
    from pipeline.config.params import Params

_INTERRUPTED = 130
_SAVES_MEMORY = {
    "advise": "lower capture.batch_rows or capture.head_chunk",
    "prepare": "lower capture.batch_rows or capture.head_chunk, or divide the teacher among GPUs "
    "by torchrun (docs/teachers.md)",
    "verify": "lower verify.batch_rows or capture.head_chunk, or divide the teacher among GPUs by "
    "torchrun (docs/teachers.md)",
    "train": "set run.activation_checkpointing=true, lower run.head_chunk, or lower "
    "train.batch_rows and raise train.gradient_accumulation_steps by the same factor",
    "evaluate": "lower evaluate.batch_rows, or divide the teacher among GPUs by torchrun "
    "(docs/teachers.md)",
    "humaneval": "lower humaneval.batch_rows",
    "generate": "lower generate.batch_rows or generate.max_new_tokens",
    "rollouts": "lower rollouts.batch_rows",
}
"""What each stage can be told to do with less memory."""


def stage(function: Callable[..., None]) -> click.Command:
    """Turn a function (params, **options) into a command; its docstring is the help text.

    The exit status is 0 for success, 1 for failure, 2 for a wrong request, 130 for an interrupt.
    """

    @click.option(
        "--params",
        "file",
        type=click.Path(path_type=Path),
        default=Path("params.yaml"),
        show_default=True,
        help="The file of parameters; keys that it leaves out have their defaults.",
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
        from pipeline.config.params import load_params

        _replace_streams()
        try:
            # DVC compares what the file says, so it would not see that a default has changed.
            params = load_params(file, overrides, complete="DVC_STAGE" in os.environ)
            _flushed(functools.partial(function, params, **options))
        except OtherRankError as error:
            sys.exit(error.exit_code)
        except DecantError as error:
            _stop(str(error), error.exit_code)
        except KeyboardInterrupt:
            _stop("interrupted: run the same command to continue", _INTERRUPTED)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _has_no_reader():
                _stop("the output was closed: run the same command to continue", 1)
            if shortage := memory_shortage(error):
                stage = Path(inspect.unwrap(function).__code__.co_filename).stem
                remedy = _SAVES_MEMORY.get(stage, "close other programs")
                _stop(f"{shortage}: {remedy}, then run the same command", 1)
            what = accident(error)
            if what is None:
                raise
            where = place_of(error)
            remedy = "make room there" if is_full(error) else "fix that"
            _stop(f"{where}{': ' if where else ''}{what}: {remedy}, then run the same command", 1)

    return click.command(context_settings={"show_default": True, "max_content_width": 100})(run)


def writes(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a stage run only if no other process writes `paths.<name>`; goes below `@stage`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(params: Params, *words: Any, **options: Any) -> None:
            from pipeline.io.hub_folder import require_writable
            from pipeline.io.ownership import lock

            require_writable(getattr(params.paths, name), key=f"paths.{name}")
            with lock(getattr(params.paths, name), f"set paths.{name} to another place"):
                function(params, *words, **options)

        return run

    return decorate


def _flushed(work: Callable[[], None]) -> None:
    """Run a function, then flush standard output while a missing reader can still be handled."""
    try:
        work()
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _replace_streams() -> None:
    """Escape characters that the encoding lacks; discard output if there is no stream at all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _has_no_reader() -> bool:
    """Return whether standard output is a pipe without a reader; if so, drop its pending output."""
    try:
        descriptor = sys.stdout.fileno()
        waiter = select.poll()
        waiter.register(descriptor, 0)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in waiter.poll(0))
    except (OSError, ValueError):
        return False
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return gone


def _stop(sentence: str, code: int) -> None:
    here = launch()
    who = f"rank {here.rank}: " if here and here.ranks > 1 else ""
    if not (who and code == _INTERRUPTED and here and here.rank):  # ranks stop together
        click.echo(f"error: {who}{printable(sentence)}", err=True)
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(code)
