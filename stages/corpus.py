"""Tokenize, split and pack the corpus: `python stages/corpus.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.cli import stage, writes

if TYPE_CHECKING:
    from pipeline.config import Params


@stage
@writes("corpus")
def main(params: Params) -> None:
    """Tokenize, split and pack the corpus into rows.

    Documents are deduplicated, divided into train and validation by a hash of their text, closed
    by an end-of-text token, and packed into rows of corpus.row_length tokens, cut at row ends or
    whole; document ids are kept. Conversations go through the teacher's chat template. Reads
    corpus.* and the teacher's tokenizer; writes paths.corpus.
    """
    from pipeline.data.corpus import build_corpus

    splits = build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    for name, info in splits.items():
        click.echo(
            f"corpus: {name} {info.num_tokens:,} tokens in {info.num_rows:,} rows from "
            f"{info.num_documents:,} documents, {info.num_padding / info.num_positions:.2%} "
            f"padding, {info.num_text_bytes / info.num_tokens:.2f} bytes a token, "
            f"{info.num_used_ids / info.vocab_size:.1%} of {info.vocab_size:,} ids used"
        )
        if params.corpus.loss_on == "completions":
            click.echo(
                f"  {info.num_in_loss / info.num_tokens:.1%} of these tokens are in the loss; "
                f"{info.num_dropped:,} conversations without any are left out"
            )


if __name__ == "__main__":
    main()
