"""Capture the teacher's top-K over the corpus: `python stages/prepare.py`."""

from __future__ import annotations

import shutil
import time

import click

from pipeline.capture import capture, fingerprint_of
from pipeline.cli import stage
from pipeline.config import Params
from pipeline.data.rows import SPLITS, CorpusSplit
from pipeline.runtime import pick_device, pick_dtype
from pipeline.store.reader import CacheReader
from pipeline.teacher.hf import HuggingFaceTeacher


@stage
@click.option("--overwrite", is_flag=True, help="Delete a cache made from something else first.")
def main(params: Params, overwrite: bool) -> None:
    """Run the teacher over the corpus and store each position's top-K logits.

    Continues at the first missing shard after a crash or Ctrl-C; refuses a cache made from another
    teacher, corpus or K, naming what differs. Reads prepare.*, paths.teacher and paths.corpus;
    writes paths.logits.
    """
    started = time.perf_counter()
    path = params.paths.logits
    corpora = [CorpusSplit(params.paths.corpus, split) for split in SPLITS]
    device = pick_device(params.device)
    dtype = pick_dtype(params.prepare.dtype, device)
    fingerprints = [
        fingerprint_of(params.paths.teacher, corpus, params.prepare, dtype) for corpus in corpora
    ]
    if overwrite:
        shutil.rmtree(path, ignore_errors=True)
    teacher = HuggingFaceTeacher(
        params.paths.teacher,
        vocab_size=corpora[0].info.vocab_size,
        dtype=dtype,
        device=device,
        head_chunk=params.prepare.head_chunk,
    )
    results = [
        capture(teacher, corpus, fingerprint, path, params.prepare)
        for corpus, fingerprint in zip(corpora, fingerprints, strict=True)
    ]
    seconds = time.perf_counter() - started
    num_bytes = sum(CacheReader(path, corpus).num_bytes() for corpus in corpora)
    positions = sum(corpus.info.num_rows * corpus.info.row_length for corpus in corpora)
    click.echo(
        f"prepare: {sum(r.tokens_done for r in results):,} tokens captured in {seconds:.0f} s, "
        f"{sum(r.shards_done for r in results)} of {sum(r.shards for r in results)} shards new; "
        f"{path} holds {positions:,} positions x top {params.prepare.k}, "
        f"{num_bytes / positions:.1f} bytes a token"
    )


if __name__ == "__main__":
    main()
