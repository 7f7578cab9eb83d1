"""Tokenize, split and pack the corpus: `python stages/corpus.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.cli import stage, writes

if TYPE_CHECKING:
    from pipeline.config.params import Params


@stage
@writes("corpus")
@click.option("--overwrite", is_flag=True, help="Rebuild it even if nothing has changed.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    show_default="one per CPU core, or two per core of the Ray cluster",
    help="Processes that tokenize, once there is enough text; with --executor ray: tasks in "
    "flight. The corpus does not depend on it.",
)
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="Tokenize on this machine, or by tasks on the Ray cluster that RAY_ADDRESS names (without "
    "one: on this machine).",
)
def main(params: Params, overwrite: bool, workers: int | None, executor: str) -> None:
    """Tokenize, split and pack the corpus into rows.

    Documents are deduplicated, divided into train and validation by a hash of their text, begun and
    closed as the tokenizer does it, and packed into rows of corpus.row_length tokens, cut at row
    ends or whole; document ids are kept. Conversations go through the teacher's chat template. At
    the end the stage says what was left out and why. Where text, tokenizer and parameters are what
    the corpus at hand was made from, there is nothing to do. Reads corpus.* and the teacher's
    tokenizer; writes paths.corpus.
    """
    from pipeline.data.corpus import build_corpus
    from pipeline.data.text_hashes import (
        is_there,
        made_from,
        read_made_from,
        write_made_from,
    )
    from pipeline.data.tokenizer_pool import available_cores
    from pipeline.io.hashes import SEEN_TEXT
    from pipeline.model.folder import teacher_folder
    from pipeline.runtime.console import announce

    teacher, address = teacher_folder(params.paths.teacher), params.paths.corpus
    source = made_from(params.corpus, teacher, address, params.paths.inputs / SEEN_TEXT)
    if not overwrite and read_made_from(address) == source and is_there(address):
        announce("corpus", f"has nothing to do: {address} was made from the same text")
        return
    if workers is None and executor == "local":
        workers = available_cores()
    splits = build_corpus(
        params.corpus, teacher, address, workers=workers, on_ray=executor == "ray"
    )
    write_made_from(address, source)
    for name, info in splits.items():
        click.echo(
            f"corpus: {name} {info.num_tokens:,} tokens in {info.num_rows:,} rows from "
            f"{info.num_documents:,} documents, {info.num_padding / info.num_positions:.2%} "
            f"padding, {info.num_text_bytes / info.num_tokens:.2f} bytes per token, "
            f"{info.num_used_ids / info.vocab_size:.1%} of {info.vocab_size:,} ids used"
        )
        if params.corpus.loss_on == "completions":
            click.echo(
                f"  {info.num_in_loss / info.num_tokens:.1%} of these tokens are in the loss; "
                f"{info.num_dropped:,} conversations without any are left out"
            )


if __name__ == "__main__":
    main()
