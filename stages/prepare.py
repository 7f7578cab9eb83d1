"""Capture the teacher's top-K over the corpus: `python stages/prepare.py`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from pipeline.cli import stage
from pipeline.errors import ParamsError
from pipeline.runtime.launch import num_ranks
from pipeline.teacher.stage_ranks import shares_teacher

if TYPE_CHECKING:
    from pipeline.config.params import Params


@stage
@shares_teacher
@click.option("--overwrite", is_flag=True, help="Delete a cache made from something else first.")
@click.option("--repair", is_flag=True, help="Check every committed shard, recapture damaged ones.")
@click.option(
    "--shards",
    "part",
    metavar="I/N",
    default="1/1",
    help="Be the I-th of N processes, on any machines, that fill one cache together.",
)
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="Capture in this process, or by actors on the Ray cluster that RAY_ADDRESS names (without "
    "one: on this machine).",
)
@click.option(
    "--actors",
    type=click.IntRange(min=1),
    show_default="one per GPU, or 1",
    help="With --executor ray: how many processes capture.",
)
def main(
    params: Params, overwrite: bool, repair: bool, part: str, executor: str, actors: int | None
) -> None:
    """Run the teacher over the corpus and store each position's top-K logits.

    Continues at the first missing shard after a crash or Ctrl-C; captures only the new rows of a
    corpus that has grown; refuses a cache made from another teacher, corpus or K, naming what
    differs. Reads prepare.*, capture.*, paths.teacher and
    paths.corpus; writes paths.logits.
    """
    from pipeline.capture.local import capture_locally
    from pipeline.capture.ray import capture_on_ray
    from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
    from pipeline.logit_cache.reader import CacheReader

    started = time.perf_counter()
    number, parts = _part(part)
    if overwrite and parts > 1:
        raise ParamsError(
            f"--overwrite with --shards {part} would delete what the other processes wrote: delete "
            f"{params.paths.logits} before they start"
        )
    if repair and parts > 1:
        raise ParamsError(
            f"--repair with --shards {part} would undo what the other processes are "
            "writing: repair with one process, then go on with several"
        )
    if executor == "ray":
        if (ranks := num_ranks()) > 1:
            raise ParamsError(
                f"--executor ray starts processes of its own, and torchrun started {ranks}: leave "
                "out one of them (--shards I/N divides the work among several torchrun commands)"
            )
        if params.device.startswith("cuda:"):
            raise ParamsError(
                f"device={params.device} names one GPU, and Ray gives each actor its own: set "
                "device=cuda"
            )
        if parts > 1:
            raise ParamsError(
                f"--shards {part} and --executor ray both divide the work: leave out one of them"
            )
        results = capture_on_ray(params, actors=actors, overwrite=overwrite, repair=repair)
    else:
        if actors is not None:
            raise ParamsError(f"--actors {actors} needs --executor ray: add that, or use --shards")
        results = capture_locally(
            params, part=number, parts=parts, overwrite=overwrite, repair=repair
        )
    seconds = time.perf_counter() - started
    shards = sum(result.shards for result in results)
    summary = (
        f"prepare: {sum(result.tokens_done for result in results):,} tokens captured in "
        f"{seconds:.0f} s, {sum(result.shards_done for result in results)} of {shards} shards new"
    )
    if missing := sum(result.shards_missing for result in results):
        click.echo(f"{summary}; {missing} are left to the other processes")
        return
    corpora = [CorpusSplit(params.paths.corpus, split) for split in SPLITS]
    readers = [CacheReader(params.paths.logits, corpus) for corpus in corpora]
    num_bytes = sum(reader.num_bytes() for reader in readers)
    positions = sum(corpus.info.num_positions for corpus in corpora)
    in_loss = sum(corpus.info.num_in_loss for corpus in corpora)
    made_from = readers[0].fingerprint
    which = f"{in_loss / positions:.1%} in the loss"
    if made_from.entropy_quantile:
        which += f", targets above entropy quantile {made_from.entropy_quantile:g} of each row"
    click.echo(
        f"{summary}; {params.paths.logits} holds {made_from.kept} of {positions:,} positions "
        f"({which}), {num_bytes / positions:.1f} bytes per token, from a teacher in "
        f"{made_from.dtype}"
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
