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
def main(params: Params, overwrite: bool) -> None:
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
    from pipeline.model.folder import teacher_folder
    from pipeline.runtime.console import announce

    teacher, address = teacher_folder(params.paths.teacher), params.paths.corpus
    source = made_from(params.corpus, teacher, address)
    if not overwrite and read_made_from(address) == source and is_there(address):
        announce("corpus", f"has nothing to do: {address} was made from the same text")
        return
    splits = build_corpus(params.corpus, teacher, address)
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
