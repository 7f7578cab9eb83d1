"""Measure what a cache would keep and cost, before the capture: `python stages/advise.py`.

Plan before anything exists: `python stages/advise.py --plan --params docs/recipes/NAME.yaml`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.cli import stage, writes
from pipeline.errors import DecantError
from pipeline.io.files import write_json, write_text
from pipeline.teacher.stage_ranks import shares_teacher

if TYPE_CHECKING:
    from pipeline.config.params import Params


@stage
@shares_teacher
@writes("advise")
@click.option(
    "--plan",
    "only_plan",
    is_flag=True,
    help="Compute size, time and memory of every stage instead, from the parameters alone.",
)
def main(params: Params, only_plan: bool) -> None:
    """Look at a sample of the corpus and say what each K and each mode would keep and cost.

    For each K: the mass it retains at each temperature, the nats it loses, bytes per token and size
    of the cache; the same for sampled ids, cuts to a mass and positions of high entropy, with the
    share of positions that have a target; then how long a capture takes, and from how many epochs
    on, over all runs, it is cheaper than an online teacher. Reads advise.*, prepare.*, capture.*,
    train.*, paths.teacher and paths.corpus; writes paths.advise/metrics.json and advice.svg.

    With --plan nothing is measured, and no teacher, corpus or GPU need be at hand: advise.device
    says what to plan for; a corpus that is there says how many of its tokens are in the loss. It
    writes paths.advise/plan.json.
    """
    if only_plan:
        _plan(params)
    else:
        _look(params)


def _plan(params: Params) -> None:
    from pipeline.planning.plan import make_plan
    from pipeline.planning.plan_text import plan_lines

    plan = make_plan(params)
    write_json(params.paths.advise / "plan.json", plan.metrics())
    for line in plan_lines(plan, params):
        click.echo(line)


def _look(params: Params) -> None:
    from pipeline.capture.capture import fingerprint_of
    from pipeline.data.corpus_zarr import CorpusSplit
    from pipeline.planning.advise import advise
    from pipeline.planning.advise_text import (
        cost_lines,
        mode_lines,
        plot,
        position_line,
        recommendation,
        table_lines,
    )
    from pipeline.runtime.device import pick_device
    from pipeline.teacher.engines import open_teacher, teacher_dtype

    corpus = CorpusSplit(params.paths.corpus, "train")
    device = pick_device(params.device)
    dtype = teacher_dtype(params, device)
    fingerprint = fingerprint_of(params, corpus, dtype)
    teacher = open_teacher(params, corpus.info.vocab_size, dtype, device)
    advice = advise(teacher, corpus, fingerprint, params)
    write_json(params.paths.advise / "metrics.json", advice.metrics())
    lines = [*table_lines(advice), *mode_lines(advice), position_line(advice), *cost_lines(advice)]
    for line in lines:
        click.echo(f"  {line}")
    if advice.left_out:
        beyond = ", ".join(map(str, advice.left_out))
        click.echo(f"  left out, beyond the {fingerprint.vocab_size} ids: K={beyond}")
    try:
        write_text(params.paths.advise / "advice.svg", plot(advice))
    except DecantError as error:
        click.echo(f"  the plot is left out: {error}")
    click.echo(
        f"advise: {advice.rows} of {advice.corpus_rows:,} rows examined, {recommendation(advice)}"
    )


if __name__ == "__main__":
    main()
