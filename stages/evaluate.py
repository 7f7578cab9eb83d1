"""Judge teacher, student and baseline: `python stages/evaluate.py`."""

from __future__ import annotations

from dataclasses import asdict

import click

from pipeline.cli import stage
from pipeline.config import Params
from pipeline.data.rows import CorpusSplit
from pipeline.errors import DecantError
from pipeline.evaluation.compare import compare, sample
from pipeline.files import write_json
from pipeline.runtime import pick_device, pick_dtype
from pipeline.teacher.hf import HuggingFaceTeacher


@stage
@click.option(
    "--run",
    "runs",
    multiple=True,
    default=("student", "baseline"),
    help="Runs under paths.runs to judge; may be repeated.",
)
def main(params: Params, runs: tuple[str, ...]) -> None:
    """Judge teacher and students on all validation rows against the live teacher.

    Validation loss, perplexity, KL to the teacher over the whole vocabulary, top-1 agreement,
    accuracy and expected calibration error. Reads evaluate.*, paths.teacher, paths.corpus and
    paths.runs; writes paths.evaluate/metrics.json, calibration.json and samples.json.
    """
    corpus = CorpusSplit(params.paths.corpus, "validation")
    folders = {run: params.paths.runs / run / "model" for run in runs}
    for run, folder in folders.items():
        if not folder.exists():
            raise DecantError(f"{folder} does not exist: run stages/train.py --run {run} first")
    device = pick_device(params.device)
    teacher = HuggingFaceTeacher(
        params.paths.teacher,
        vocab_size=corpus.info.vocab_size,
        dtype=pick_dtype(params.prepare.dtype, device),
        device=device,
    )
    comparison = compare(teacher, folders, corpus, params.evaluate, params.prepare.attention)
    metrics = {
        name: asdict(scores) | {"parameters": comparison.parameters[name]}
        for name, scores in comparison.scores.items()
    }
    calibration = [
        {"model": name, **point}
        for name, points in comparison.calibration.items()
        for point in points
    ]
    samples = {
        name: sample(folder, params.evaluate.prompts, params.evaluate.new_tokens)
        for name, folder in {"teacher": params.paths.teacher, **folders}.items()
    }
    write_json(params.paths.evaluate / "metrics.json", metrics)
    write_json(params.paths.evaluate / "calibration.json", calibration)
    write_json(
        params.paths.evaluate / "samples.json",
        {"prompts": params.evaluate.prompts, "continuations": samples},
    )
    click.echo(f"  {'model':12} {'loss':>8} {'ppl':>9} {'KL':>8} {'top-1':>7} {'ECE':>7}")
    for name, scores in comparison.scores.items():
        click.echo(
            f"  {name:12} {scores.loss:8.4f} {scores.perplexity:9.3f} {scores.kl_to_teacher:8.4f} "
            f"{scores.top1_agreement:7.4f} {scores.calibration_error:7.4f}"
        )
    click.echo(f"evaluate: {len(metrics)} models on {comparison.scores['teacher'].tokens:,} tokens")


if __name__ == "__main__":
    main()
