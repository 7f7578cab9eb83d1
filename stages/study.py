"""Study the parts of a model, checked number by number: `python stages/study.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import stage, writes
from pipeline.errors import printable
from pipeline.study import PART_NAMES

if TYPE_CHECKING:
    from pipeline.config.params import Params
    from pipeline.study.comparison import Part


@stage
@writes("study")
@click.option(
    "--model", show_default="paths.teacher", help="A Hugging Face folder, or an id on the hub."
)
@click.option("--revision", show_default="the newest", help="Commit hash of a model on the hub.")
@click.option("--layer", default=0, help="The decoder layer to look into, from 0.")
@click.option(
    "--part",
    "parts",
    type=click.Choice(PART_NAMES),
    multiple=True,
    show_default="all",
    help="Only this part; may be repeated.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    show_default="paths.study",
    help="Where to write.",
)
def main(
    params: Params,
    model: str | None,
    revision: str | None,
    layer: int,
    parts: tuple[str, ...],
    output: Path | None,
) -> None:
    """Take a model apart and compare every piece with Hugging Face's.

    The golden reference and the loop behind it, architecture, weights, tokenizer, one layer alone,
    RMSNorm, RoPE, attention, SwiGLU, KV cache and speed, each with the largest absolute difference
    and its limit. Reads study.*, seed and the model; writes paths.study/study.md, study.json and
    the layer's tensors. Exits with status 1 when a comparison fails.
    """
    from pipeline.model.folder import teacher_folder
    from pipeline.runtime.console import announce
    from pipeline.runtime.device import pick_device
    from pipeline.study.study import run_parts
    from pipeline.study.study_report import describe_device, write_study
    from pipeline.study.subject import Subject, locate

    subject = Subject(
        locate(model, revision) if model else teacher_folder(params.paths.teacher),
        params.study,
        layer=layer,
        device=pick_device(params.device),
        seed=params.seed,
    )
    announce("study", f"takes {subject.describe()} apart: {', '.join(parts or PART_NAMES)}")
    found: list[Part] = []
    for part in run_parts(subject, parts or PART_NAMES):
        _print(part)
        found.append(part)
    device = describe_device(subject.device)
    report = write_study(output or params.paths.study, subject.describe(), device, found)
    click.echo(f"  on {device}")
    total = sum(len(part.comparisons) for part in found)
    failed = sum(len(part.failed) for part in found)
    click.echo(f"study: {total - failed} of {total} comparisons pass; {report}")
    if failed:
        sys.exit(1)


def _print(part: Part) -> None:
    from pipeline.study.comparison import shown

    click.echo(printable(part.title))
    if not part.comparisons:
        click.echo(f"  {printable(part.notes[0])}")
    for c in part.comparisons:
        word = click.style("pass", fg="green") if c.passed else click.style("FAIL", fg="red")
        name, most = printable(c.name), shown(c.limit)
        click.echo(f"  {word}  {name:48} {shown(c.measured):>8}, at most {most}")


if __name__ == "__main__":
    main()
