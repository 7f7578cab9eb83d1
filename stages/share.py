"""Publish corpus and cache on the Hugging Face hub: `python stages/share.py --push ORG/NAME`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from pipeline.cli import stage
from pipeline.errors import ParamsError, printable

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.config.params import Params
    from pipeline.export.shared_files import SharedFile
    from pipeline.logit_cache.reader import CacheReader
    from pipeline.verify.gate_report import GateReport


@stage
@click.option("--push", "repo_id", metavar="ORG/NAME", help="The dataset repository.")
@click.option("--license", "license_id", metavar="ID", help="Its licence, by its id on the hub.")
@click.option("--public", is_flag=True, help="Make a new repository public (default: private).")
@click.option("--dry-run", is_flag=True, help="Print what would be sent and the card, and stop.")
def main(
    params: Params, repo_id: str | None, license_id: str | None, public: bool, dry_run: bool
) -> None:
    """Publish corpus, cache and tokenizer as a dataset repository, with a card.

    Everything is first read against its checksums; what is incomplete or damaged is refused. A push
    that was interrupted is completed by the same command. paths.corpus and paths.logits can then be
    set to hf://datasets/ORG/NAME. Reads paths.corpus, paths.logits, paths.teacher and
    paths.verify/metrics.json; writes no file.
    """
    from pipeline.data.vocabulary import tokenizer_folder
    from pipeline.export.dataset_card import dataset_card, gate_of
    from pipeline.export.push import require_repo_id
    from pipeline.export.push_dataset import push_dataset
    from pipeline.export.shared_files import open_whole, shared_files
    from pipeline.io.ownership import lock
    from pipeline.logit_cache.reader import require_teacher
    from pipeline.model.folder import teacher_folder

    if repo_id is None:
        raise ParamsError("share publishes to a dataset repository: name it by --push ORG/NAME")
    require_repo_id(repo_id)
    wait = "wait until it has ended"
    with lock(params.paths.corpus, wait), lock(params.paths.logits, wait):
        readers = open_whole(params.paths)
        teacher = teacher_folder(params.paths.teacher)
        tokenizer = tokenizer_folder([teacher], readers[0].corpus)
        require_teacher(readers[0], teacher)  # the card would name another one
        files = shared_files(params.paths, readers, tokenizer)
        card = dataset_card(params, readers, files, repo_id, license_id)
        _say_files(files, readers)
        for gap in _gaps(readers, license_id, teacher, tokenizer, gate_of(params, readers)):
            click.echo(f"  {printable(gap)}")
        if dry_run:
            click.echo(f"\n{printable(card)}")
            kind = "public" if public else "private"
            click.echo(f"share: these would go to {repo_id}, {kind} if new; nothing was sent")
            return
        pushed = push_dataset(files, card, repo_id, public=public)
    click.echo(f"share: pushed to {pushed.url}, {pushed.sent:,} of {len(files):,} files were new")
    for name in ("corpus", "logits"):
        click.echo(f"  paths.{name}: hf://datasets/{repo_id}@{pushed.commit}")


def _gaps(
    readers: list[CacheReader],
    license_id: str | None,
    teacher: Path,
    tokenizer: Path | None,
    gate: GateReport | None,
) -> Iterator[str]:
    """Yield what the card or the repository lacks, and how to add it."""
    if license_id is None:
        yield "the card states no licence: name it by --license"
    if tokenizer is None:
        yield f"{teacher} holds no tokenizer, so none is published"
    if origin := readers[0].fingerprint.imported_from:
        yield f"the card names neither teacher nor text: an import from {origin} records none"
    elif not (teacher / "config.json").exists():
        yield f"{teacher} holds no model: the card names the teacher of teacher.*, unchecked"
    if gate is None:
        yield "the card has no numbers of the gate: run stages/verify.py first"
    elif not gate.passed:
        yield "the gate FAILED on this cache, and the card says so"


def _say_files(files: dict[str, SharedFile], readers: list[CacheReader]) -> None:
    """Print number and size of the files of each folder, and where they are many for the hub."""
    from pipeline.export.push_dataset import MANY_ENTRIES, MANY_FILES
    from pipeline.runtime.console import readable_bytes

    number, size = Counter[str](), Counter[str]()
    for path, file in files.items():
        number[path.partition("/")[0]] += 1
        size[path.partition("/")[0]] += file.size
    for tree, count in number.items():
        click.echo(f"  {tree:12} {count:10,} files  {readable_bytes(size[tree])}")
    shards = max(reader.layout.num_shards for reader in readers)
    if len(files) > MANY_FILES or shards > MANY_ENTRIES:
        click.echo(
            f"  warning: {len(files):,} files, up to {shards:,} in one folder; the hub advises at "
            f"most {MANY_FILES:,} and {MANY_ENTRIES:,}: capture with a larger prepare.shard_rows"
        )


if __name__ == "__main__":
    main()
