"""Tokenize, split and pack the corpus: `python stages/corpus.py`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from pipeline.cli import stage, writes
from pipeline.errors import MismatchError, ParamsError

if TYPE_CHECKING:
    from pipeline.config.params import Params
    from pipeline.data.corpus_zarr import SplitInfo


@stage
@writes("corpus")
@click.option("--overwrite", is_flag=True, help="Rebuild it even if nothing has changed.")
@click.option("--append", is_flag=True, help="Keep its rows; add those of documents it lacks.")
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
def main(params: Params, overwrite: bool, append: bool, workers: int | None, executor: str) -> None:
    """Tokenize, split and pack the corpus into rows.

    Documents are deduplicated, divided into train and validation by a hash of their text, begun and
    closed as the tokenizer does it, and packed into rows of corpus.row_length tokens, cut at row
    ends or whole; document ids are kept. Conversations go through the teacher's chat template. At
    the end the stage says what was left out and why. Where text, tokenizer and parameters are what
    the corpus at hand was made from, there is nothing to do. Where they differ only in that
    corpus.files.paths finds more files, or that a split may have more tokens, the rows stay and new
    ones follow them, as with --append. Reads corpus.* and the teacher's tokenizer; writes
    paths.corpus.
    """
    from pipeline.data.corpus import build_corpus
    from pipeline.data.corpus_zarr import IMPORTED, ROLLOUTS, SPLITS, CorpusSplit, read_made_from
    from pipeline.data.text_hashes import (
        EARLIER,
        begin_append,
        earlier_files,
        has_grown,
        is_same,
        is_there,
        made_from,
        require_appendable,
        write_made_from,
    )
    from pipeline.data.tokenizer_pool import available_cores
    from pipeline.io.hashes import SEEN_TEXT
    from pipeline.model.folder import teacher_folder
    from pipeline.runtime.console import announce, say

    if append and overwrite:
        raise ParamsError("--append keeps the corpus and --overwrite rebuilds it: leave out one")
    teacher, address = teacher_folder(params.paths.teacher), params.paths.corpus
    before = read_made_from(address)
    if (origin := before.get(IMPORTED)) and not overwrite:
        raise MismatchError(
            f"{address} was imported from {origin} by stages/convert.py, and holds no text to add "
            "to: set paths.corpus to another place, or replace it by --overwrite"
        )
    if ROLLOUTS in before and not overwrite:
        raise MismatchError(
            f"{address} holds rollouts, which stages/rollouts.py made and no text can be added to: "
            "set paths.corpus to another place, run stages/rollouts.py to write rollouts again, or "
            "replace them by --overwrite"
        )
    source = made_from(params.corpus, teacher, address, params.paths.inputs / SEEN_TEXT)
    there = is_there(address)
    if append:
        require_appendable(address, before, source)
    if not overwrite and there and is_same(before, source):
        announce("corpus", f"has nothing to do: {address} was made from the same text")
        return
    if workers is None and executor == "local":
        workers = available_cores()
    build = partial(
        build_corpus, params.corpus, teacher, address, workers=workers, on_ray=executor == "ray"
    )
    had: dict[str, SplitInfo] = {}
    if append or (not overwrite and there and has_grown(before, source)):
        had = {split: CorpusSplit(address, split).info for split in SPLITS}
        begin = partial(begin_append, address, before, source)
        splits = build(append=True, before_commit=begin)
        earlier = earlier_files(before, source)
        write_made_from(address, source | ({EARLIER: earlier} if earlier else {}))
    else:
        gone = earlier_files(before, source)
        if gone and EARLIER in before:  # whoever appended files by hand may not expect this
            say(
                f"corpus: rows are made anew from what is named now, without {len(gone)} of the "
                f"files that the corpus was made from, for example {gone[0][0]}"
            )
        splits = build()
        write_made_from(address, source)
    if splits == had:
        click.echo(f"corpus: nothing is new, {address} stays as it was")
        return
    for name, info in splits.items():
        click.echo(_summary(name, info, had.get(name)))
        if params.corpus.loss_on == "completions":
            click.echo(
                f"  {info.num_in_loss / info.num_tokens:.1%} of these tokens are in the loss; "
                f"{info.num_dropped:,} conversations without any are left out"
            )


def _summary(name: str, info: SplitInfo, before: SplitInfo | None) -> str:
    new = ""
    if before:
        rows, documents = (
            getattr(info, count) - getattr(before, count) for count in ("num_rows", "num_documents")
        )
        new = f" ({rows:,} rows and {documents:,} documents are new)"
    return (
        f"corpus: {name} {info.num_tokens:,} tokens in {info.num_rows:,} rows from "
        f"{info.num_documents:,} documents{new}, {info.num_padding / info.num_positions:.2%} "
        f"padding, {info.num_text_bytes / info.num_tokens:.2f} bytes per token, "
        f"{info.num_used_ids / info.vocab_size:.1%} of {info.vocab_size:,} ids used"
    )


if __name__ == "__main__":
    main()
