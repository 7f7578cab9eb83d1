"""Run the gate, which compares the cache with the live teacher: `python stages/verify.py`.

What quantisation of the teacher costs: `python stages/verify.py --against UNQUANTISED_FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import stage, writes
from pipeline.errors import ParamsError, printable
from pipeline.teacher.stage_ranks import shares_teacher

if TYPE_CHECKING:
    from pipeline.config.params import Params


@stage
@shares_teacher
@writes("verify")
@click.option(
    "--structure",
    is_flag=True,
    help="Only read every shard against its checksums, marker and corpus; the teacher is not run.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Instead compare the teacher with the model of this folder, for example the one that it "
    "was quantised from; no cache is needed.",
)
def main(params: Params, structure: bool, against: Path | None) -> None:
    """Recompute sampled rows with the live teacher and compare their targets with the cache.

    Exit status 1 when a limit is missed, which is verify.noise_factor times the teacher's own noise
    and at most what verify.* says, or when the negative control (targets shifted by one) passes.
    Says which faults a check of this size would have found. Reads paths.teacher, paths.corpus and
    paths.logits; writes paths.verify/metrics.json and histogram.json.

    With --against it says how far the teacher is from another model on validation rows, KL, top-1
    and cross-entropy, beside what the cut at prepare.k leaves out. It is a report, with exit status
    0, and writes paths.verify/against.json.
    """
    if structure and against is not None:
        raise ParamsError("--structure and --against are two checks: give one of them")
    if against is not None:
        _compare_with(params, against)
    elif structure:
        _check_structure(params)
    else:
        _run_gate(params)


def _run_gate(params: Params) -> None:
    from pipeline.capture.capture import fingerprint_of
    from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
    from pipeline.io.files import write_json
    from pipeline.logit_cache.reader import CacheReader
    from pipeline.runtime.device import dtype_name, inference_dtype, pick_device
    from pipeline.teacher.engines import (
        describe_engine,
        differ_in_ranks_alone,
        open_teacher,
        teacher_dtype,
    )
    from pipeline.verify.gate import run_gate

    corpora = [CorpusSplit(params.paths.corpus, split) for split in SPLITS]
    splits = [(corpus, CacheReader(params.paths.logits, corpus)) for corpus in corpora]
    device = pick_device(params.device)
    made_from = splits[0][1].fingerprint
    if made_from.imported_from:  # nothing says what its teacher ran in
        dtype = teacher_dtype(params, device)
    else:
        dtype = inference_dtype(
            made_from.dtype,
            device,
            key="the cache's dtype",
            remedy="verify it where it was captured, or capture it again with another "
            "prepare.dtype",
        )
    engine_now = describe_engine(params)
    for corpus, reader in splits:
        stored = reader.fingerprint
        # The cache may have other values of these parameters; only its inputs must match. Other
        # ranks than those that shared the teacher may share it now.
        same = differ_in_ranks_alone(stored.engine, engine_now)
        names = ("k", "num_sampled", "temperatures", "top_p", "entropy_quantile", "document_mask")
        kept = {name: getattr(stored, name) for name in names}
        kept["positions"] = "high_entropy" if stored.entropy_quantile else "in_loss"
        prepare = params.prepare.model_copy(update=kept)
        seed = stored.sampling_seed if stored.num_sampled else params.seed
        as_stored = params.model_copy(update={"prepare": prepare, "seed": seed})
        wanted = fingerprint_of(
            as_stored, corpus, dtype, engine=stored.engine if same else engine_now
        )
        stored.require_equal(
            wanted.with_origin_of(stored) if stored.imported_from else wanted,
            str(reader.address),
            "capture again with stages/prepare.py --overwrite, or restore what changed",
        )
    # vLLM first, since it takes its share of a GPU's memory when it starts.
    teachers = {
        engine: open_teacher(params, corpora[0].info.vocab_size, dtype, device, engine=engine)
        for engine in sorted({params.prepare.engine, params.verify.engine}, reverse=True)
    }
    report, histogram = run_gate(
        teachers[params.verify.engine],
        splits,
        params.verify,
        seed=params.seed,
        noise_teacher=teachers[params.prepare.engine],
        engines=(engine_now, describe_engine(params, params.verify.engine)),
    )
    about = {
        "passed": report.passed,
        "cache_sha256": {corpus.split: reader.layout.sha256() for corpus, reader in splits},
    }
    write_json(params.paths.verify / "metrics.json", about | vars(report))
    write_json(params.paths.verify / "histogram.json", histogram)
    for line in report.lines():
        click.echo(f"  {line}")
    verdict = "passed" if report.passed else "FAILED: " + "; ".join(report.failures)
    click.echo(
        f"verify: {report.batches} batches, {report.tokens:,} tokens in "
        f"{dtype_name(dtype)}, gate {verdict}"
    )
    sys.exit(0 if report.passed else 1)


def _compare_with(params: Params, folder: Path) -> None:
    from pipeline.io.files import write_json
    from pipeline.verify.against import compare_with

    report = compare_with(folder, params)
    write_json(params.paths.verify / "against.json", report)
    for line in report.lines():
        click.echo(f"  {line}")
    click.echo(printable(f"verify: {report.tokens:,} tokens against {folder}"))


def _check_structure(params: Params) -> None:
    from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
    from pipeline.io.hub_folder import remedy_for_damage
    from pipeline.logit_cache.integrity import check_cache
    from pipeline.logit_cache.layout import repair_command

    whole, shards = True, 0
    for split in SPLITS:
        result = check_cache(params.paths.logits, CorpusSplit(params.paths.corpus, split))
        for damage in result.damages:
            place = split if damage.shard is None else f"{split} shard {damage.shard}"
            click.echo(f"  {place}: {printable(damage.what)}")
        if result.missing:
            click.echo(f"  {split}: {result.missing} of {result.shards} shards are not captured")
        whole = whole and not result.damages and not result.missing
        shards += result.committed
    command = repair_command(params.paths.logits / SPLITS[0])
    how = remedy_for_damage(params.paths.logits, command)
    verdict = "all whole" if whole else f"NOT intact; {how}"
    click.echo(f"verify: {shards} committed shards read, {verdict}")
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
