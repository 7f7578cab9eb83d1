"""Export a trained student as a Hugging Face folder and GGUF files: `python stages/export.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import stage, writes
from pipeline.errors import ParamsError, printable

if TYPE_CHECKING:
    from pipeline.config.params import Params
    from pipeline.export.check_result import ExportCheck


@stage
@writes("export")
@click.option("--run", default="student", help="The run under paths.runs to export.")
@click.option(
    "--model",
    type=click.Path(path_type=Path, file_okay=False),
    help="Export this Hugging Face folder instead.",
)
@click.option("--push", "repo_id", metavar="ORG/NAME", help="Then publish it on the hub.")
@click.option(
    "--public", is_flag=True, help="With --push: make the repository public (default: private)."
)
@click.option("--dry-run", is_flag=True, help="With --push: list what would be sent, and stop.")
def main(
    params: Params, run: str, model: Path | None, repo_id: str | None, public: bool, dry_run: bool
) -> None:
    """Export a model as a Hugging Face folder with GGUF files, and check it on three paths.

    Our generation, transformers and llama.cpp continue the same prompts with the exported weights,
    and tokenize the same lines. Reads export.*, paths.runs or --model, paths.corpus and
    paths.evaluate; writes paths.export/NAME and paths.export/check.json. Leaves with status 1 when
    a path that must agree does not; then nothing is pushed.
    """
    from pipeline.export.card import run_facts
    from pipeline.export.export import check_model, export_model
    from pipeline.export.push import files_of, push, require_repo_id
    from pipeline.export.source import find_model

    if (public or dry_run) and repo_id is None:
        raise ParamsError("--public and --dry-run go with --push ORG/NAME: add it")
    if repo_id is not None:
        require_repo_id(repo_id)
    found = find_model(params, run, model)
    folder = export_model(params, found)
    check = check_model(params, found)
    _say_check(check)
    if found.run and (unknown := run_facts(params, found.run).unknown):
        click.echo(
            f"  the model card leaves out what is recorded nowhere: set {' and '.join(unknown)}"
        )
    files = files_of(folder)
    total = sum(size for _, size in files) / 1e6
    agrees = "agrees" if check.passed else "does NOT agree"
    click.echo(f"export: {folder} holds {len(files)} files, {total:,.0f} MB, and {agrees}")
    if not check.passed:
        sys.exit(1)
    if repo_id is not None:
        for name, size in files:
            click.echo(f"  {size / 1e6:10,.1f} MB  {printable(name)}")
        kind = "public" if public else "private"
        if dry_run:
            click.echo(f"export: these would go to {repo_id}, {kind}; nothing was sent")
        else:
            click.echo(f"export: pushed to {push(folder, repo_id, public=public)}, new ones {kind}")


def _say_check(check: ExportCheck) -> None:
    """A line for each path and tokenizer."""
    for path in check.paths:
        ties = f", {path.near_ties} near ties" if path.near_ties else ""
        click.echo(
            f"  {_word(path.passed)}  {path.name:22} {path.equal_tokens} of {path.tokens} tokens "
            f"as {check.reference}{ties}, {path.equal_prompts} of {check.prompts} prompts"
        )
    for tokenizer in check.tokenizers:
        click.echo(
            f"  {_word(tokenizer.passed)}  {tokenizer.name + ' tokenizer':22} "
            f"{tokenizer.equal_lines:,} of {tokenizer.lines:,} lines"
        )
    for words in check.left_out:
        click.echo(f"  {printable(words)}")


def _word(passed: bool) -> str:
    return click.style("pass", fg="green") if passed else click.style("FAIL", fg="red")


if __name__ == "__main__":
    main()
