"""Capture the teacher's top-K over the corpus: `python stages/prepare.py`."""

from __future__ import annotations

import time

import click

from pipeline.capture import Capture, CaptureResult, fingerprint_of, part_of
from pipeline.cli import stage
from pipeline.config import Params
from pipeline.data.rows import SPLITS, CorpusSplit
from pipeline.errors import ParamsError
from pipeline.runtime import pick_device, pick_dtype, say
from pipeline.storage import open_folder
from pipeline.store.reader import CacheReader
from pipeline.teacher.hf import HuggingFaceTeacher


@stage
@click.option("--overwrite", is_flag=True, help="Delete a cache made from something else first.")
@click.option("--repair", is_flag=True, help="Check every committed shard, recapture damaged ones.")
@click.option(
    "--shards",
    "part",
    metavar="I/N",
    default="1/1",
    help="Be the I-th of N processes, on any machines, that fill one cache together.",
)
def main(params: Params, overwrite: bool, repair: bool, part: str) -> None:
    """Run the teacher over the corpus and store each position's top-K logits.

    Continues at the first missing shard after a crash or Ctrl-C; refuses a cache made from another
    teacher, corpus or K, naming what differs. Reads prepare.*, paths.teacher and paths.corpus;
    writes paths.logits.
    """
    started = time.perf_counter()
    number, parts = _part(part)
    corpora = [CorpusSplit(params.paths.corpus, split) for split in SPLITS]
    device = pick_device(params.device)
    dtype = pick_dtype(params.prepare.dtype, device)
    fingerprints = [fingerprint_of(params, corpus, dtype) for corpus in corpora]
    if overwrite:
        open_folder(params.paths.logits).remove()
    teacher = HuggingFaceTeacher(
        params.paths.teacher,
        vocab_size=corpora[0].info.vocab_size,
        dtype=dtype,
        device=device,
        head_chunk=params.prepare.head_chunk,
    )
    results: list[CaptureResult] = []
    for corpus, fingerprint in zip(corpora, fingerprints, strict=True):
        capture = Capture(teacher, corpus, fingerprint, params, repair=repair)
        for damage in capture.repaired:
            shard = "" if damage.shard is None else f"shard {damage.shard}: "
            say(f"prepare: {corpus.split} {shard}{damage.what}; mended")
        results.append(capture.run(part_of(capture.writer.missing(), number, parts)))
    seconds = time.perf_counter() - started
    shards = sum(result.shards for result in results)
    summary = (
        f"prepare: {sum(result.tokens_done for result in results):,} tokens captured in "
        f"{seconds:.0f} s, {sum(result.shards_done for result in results)} of {shards} shards new"
    )
    if missing := sum(result.shards_missing for result in results):
        click.echo(f"{summary}; {missing} are left to the other processes")
        return
    num_bytes = sum(CacheReader(params.paths.logits, corpus).num_bytes() for corpus in corpora)
    positions = sum(corpus.info.num_rows * corpus.info.row_length for corpus in corpora)
    draws = f" + {params.prepare.draws} draws" if params.prepare.draws else ""
    click.echo(
        f"{summary}; {params.paths.logits} holds {positions:,} positions x top {params.prepare.k}"
        f"{draws}, {num_bytes / positions:.1f} bytes a token"
    )


def _part(text: str) -> tuple[int, int]:
    """Parse I/N."""
    try:
        number, parts = map(int, text.split("/"))
    except ValueError:
        number, parts = 0, 0
    if not 1 <= number <= parts:
        raise ParamsError(f"--shards {text} is not I/N with I from 1 to N, for example 2/8")
    return number, parts


if __name__ == "__main__":
    main()
