"""Import another tool's teacher outputs, or export the cache for another tool.

python stages/convert.py --from distillkit --source FOLDER
python stages/convert.py --to axolotl --output FOLDER
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import stage
from pipeline.errors import ParamsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config.params import Params
    from pipeline.data.packing import Rows
    from pipeline.interchange.dataset_folder import Table
    from pipeline.targets.topk import TopK


@stage
@click.option(
    "--from", "origin", type=click.Choice(["distillkit"]), help="Import from this format."
)
@click.option(
    "--to", "target", type=click.Choice(["axolotl", "datasets"]), help="Export to this format."
)
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FOLDER",
    help="With --from: the folder or file to import; may be repeated.",
)
@click.option(
    "--compression",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --from: the configuration that the capture was compressed with; by default "
    "compression_config.yaml beside the files.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="With --to: the folder to write.",
)
@click.option(
    "--k",
    type=click.IntRange(min=1),
    help="Keep only the K most probable ids of each position.",
    show_default="all that are there",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="With --from: import anew, in place of the corpus and the cache that are there.",
)
def main(
    params: Params,
    origin: str | None,
    target: str | None,
    source: tuple[Path, ...],
    compression: Path | None,
    output: Path | None,
    k: int | None,
    overwrite: bool,
) -> None:
    """Convert teacher outputs from or to the files of other tools.

    --from distillkit reads a capture of DistillKit, in parquet or arrow files, and makes a corpus
    and a cache of it, for the tokenizer in paths.teacher. Continues an import that was interrupted.
    --to axolotl writes the columns of axolotl's KD plugin, at train.temperature; --to datasets a
    plain Hugging Face dataset. At the end the stage says what the format could not hold. Reads
    corpus.*, prepare.chunk_rows, prepare.shard_rows, train.temperature, paths.teacher, or
    paths.corpus and paths.logits; writes paths.corpus and paths.logits, or the output.
    """
    if (origin is None) == (target is None):
        raise ParamsError(
            "convert needs a direction: give --from distillkit, --to axolotl or --to datasets"
        )
    of_import = {"--source": source, "--compression": compression, "--overwrite": overwrite}
    of_export = {"--output": output}
    way, others = ("--to", of_import) if origin is None else ("--from", of_export)
    for name, value in others.items():
        if value:
            raise ParamsError(f"{name} does not go with {way}: leave it out")
    if target is None:
        if not source:
            raise ParamsError("--from distillkit needs the capture: name its folder by --source")
        _import(params, source, compression, k, overwrite=overwrite)
    else:
        if output is None:
            raise ParamsError(f"--to {target} needs a folder to write: name it by --output")
        _export(params, target, output, k)


def _import(
    params: Params,
    source: tuple[Path, ...],
    compression: Path | None,
    k: int | None,
    *,
    overwrite: bool,
) -> None:
    from pipeline.interchange.distillkit import DistillKitCapture
    from pipeline.interchange.import_cache import import_capture

    capture = DistillKitCapture(source, compression)
    found = import_capture(params, capture, k=k, overwrite=overwrite)
    for corpus in found.corpora:
        info = corpus.info
        click.echo(
            f"convert: {corpus.split} {info.num_tokens:,} tokens in {info.num_rows:,} rows of "
            f"{info.row_length} from {info.num_documents:,} documents, "
            f"{info.num_padding / info.num_positions:.2%} padding"
        )
    cleaned = found.cleaned
    if cleaned.divided:
        click.echo(
            f"  at {cleaned.divided / cleaned.positions:.2%} of the positions the decoded "
            "probabilities added up to more than 1, and were divided by their sum"
        )
    if cleaned.beyond:
        click.echo(
            f"  {cleaned.beyond:,} kept ids lie beyond the tokenizer's and were left out, their "
            "mass counts to the tail"
        )
    click.echo(
        "  lost: what DistillKit does not store, lse, entropy and normalisers; such a cache trains "
        "at temperature 1 alone"
    )
    click.echo(
        f"convert: {params.paths.logits} holds the top {found.k} of each position, "
        f"{found.shards_done} shards new"
    )


def _export(params: Params, target: str, output: Path, k: int | None) -> None:
    from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
    from pipeline.interchange.axolotl import axolotl_table, lost_to_axolotl
    from pipeline.interchange.dataset_folder import write_dataset
    from pipeline.interchange.hf_dataset import lost_to_datasets, plain_table
    from pipeline.logit_cache.reader import CacheReader

    corpora = [CorpusSplit(params.paths.corpus, split) for split in SPLITS]
    readers = [CacheReader(params.paths.logits, corpus) for corpus in corpora]
    made_from = readers[0].fingerprint
    to_table: Callable[[Rows, TopK], Table]
    if target == "datasets":
        to_table, text = plain_table, "Rows of tokens with a teacher's distributions"
        lost, unit = lost_to_datasets(made_from), "rows"
    elif made_from.k:
        temperature = params.train.temperature
        to_table = axolotl_table(document_mask=made_from.document_mask, temperature=temperature)
        text = f"Documents for axolotl's KD plugin, at kd_temperature {temperature:g}"
        lost, unit = lost_to_axolotl(made_from), "examples"
    else:
        raise ParamsError(
            f"{params.paths.logits} stores sampled ids alone, and axolotl's columns hold the most "
            "probable ids: capture with prepare.k of at least 1"
        )
    number = write_dataset(output, readers, to_table, k=k, text=text)
    for what in lost:
        click.echo(f"  lost: {what}")
    click.echo(f"convert: {output} holds {number:,} {unit} for {target}")


if __name__ == "__main__":
    main()
