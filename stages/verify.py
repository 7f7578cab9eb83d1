"""The gate, cache against live teacher: `python stages/verify.py`."""

from __future__ import annotations

import sys

import click

from pipeline.capture import fingerprint_of
from pipeline.cli import stage
from pipeline.config import Params
from pipeline.data.rows import SPLITS, CorpusSplit
from pipeline.fidelity import run_gate
from pipeline.files import write_json
from pipeline.runtime import DTYPES, pick_device
from pipeline.store.reader import CacheReader
from pipeline.teacher.hf import HuggingFaceTeacher


@stage
def main(params: Params) -> None:
    """Recompute sampled rows with the live teacher and compare them with the cache.

    Exit status 1 when a threshold of verify.* is missed, or when the negative control (targets
    shifted by one) passes. Reads paths.teacher, paths.corpus and paths.logits; writes
    paths.verify/metrics.json and histogram.json.
    """
    corpora = [CorpusSplit(params.paths.corpus, split) for split in SPLITS]
    splits = [(corpus, CacheReader(params.paths.logits, corpus)) for corpus in corpora]
    dtype = DTYPES[splits[0][1].fingerprint.dtype]
    for corpus, reader in splits:
        stored = reader.fingerprint
        layout = params.prepare.model_copy(
            update={"k": stored.k, "temperatures": stored.temperatures}
        )
        stored.require_equal(
            fingerprint_of(params.paths.teacher, corpus, layout, dtype),
            str(reader.path),
            "capture again with stages/prepare.py --overwrite, or restore what changed",
        )
    teacher = HuggingFaceTeacher(
        params.paths.teacher,
        vocab_size=corpora[0].info.vocab_size,
        dtype=dtype,
        device=pick_device(params.device),
        head_chunk=params.prepare.head_chunk,
    )
    report = run_gate(teacher, splits, params.verify, seed=params.seed)
    write_json(params.paths.verify / "metrics.json", report.metrics())
    write_json(params.paths.verify / "histogram.json", report.histogram)
    for name, summary in (
        ("cache against teacher", report.cache),
        ("noise floor", report.noise),
        ("negative control", report.control),
    ):
        click.echo(
            f"  {name:22} mean cosine {summary.mean_cosine:.6f}, KL {summary.mean_kl:.2e}, "
            f"top-1 {summary.top1:.4f}, overlap {summary.overlap:.4f}"
        )
    verdict = "passed" if report.passed else "FAILED: " + "; ".join(report.failures)
    click.echo(f"verify: {report.batches} batches, {report.tokens:,} tokens, gate {verdict}")
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
