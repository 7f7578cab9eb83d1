"""What each target is worth: one student, corpus and number of steps, every target, several seeds.

    python tests/benchmarks/quality.py [--work FOLDER] [--seeds 3] [--steps 48]

Needs the demo's teacher and corpus (`dvc repro corpus`). Takes hours on a CPU; what lies finished
in FOLDER, caches and runs, is not made again, so it may be stopped and started.

Every student starts from the same layers of the teacher and takes the same steps, at temperature 1,
the only one stored; a seed decides the order of the rows. "Dense" is the live teacher with every id
of the vocabulary kept: the full KL. The last two columns say how much of the way from cross-entropy
to dense a target goes, in validation loss and in KL to the teacher, by the means over seeds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import click
import torch
from torch import Tensor

from pipeline.capture.local import capture_locally
from pipeline.config.params import Params, load_params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.evaluation.compare import compare
from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.models import open_models
from pipeline.logit_cache.reader import CacheReader
from pipeline.targets import block_search
from pipeline.targets.block_search import block_top_k
from pipeline.teacher.engines import teacher_dtype
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training.run import run_training


@dataclass(frozen=True)
class Target:
    """What a student learns from."""

    name: str
    targets: str = "cached"
    k: int = 64
    num_sampled: int = 0
    top_p: float | None = None
    positions: str = "in_loss"

    def overrides(self, work: Path, steps: int) -> list[str]:
        """For `load_params`."""
        return [
            f"paths.logits={work}/logits-{self._kept}",
            f"paths.runs={work}/runs",
            f"prepare.k={self.k}",
            f"prepare.num_sampled={self.num_sampled}",
            f"prepare.top_p={'null' if self.top_p is None else self.top_p}",
            f"prepare.positions={self.positions}",
            "prepare.entropy_quantile=0.5",
            "prepare.temperatures=[1.0]",
            f"train.targets={self.targets}",
            f"train.steps={steps}",
            "train.temperature=1",
            "train.eval_every=100000",  # at the end alone
        ]

    @property
    def _kept(self) -> str:
        return f"{self.k}-{self.num_sampled}-{self.top_p}-{self.positions}"

    def run_name(self, seed: int) -> str:
        """The folder under runs."""
        return f"{self.targets}-{self._kept}-{seed}"


CROSS_ENTROPY = Target("cross-entropy alone", targets="none", k=1)
DENSE = Target("dense, live teacher", targets="online")
TARGETS = (
    CROSS_ENTROPY,
    Target("top 64, tail bucket"),
    Target("top 64, top_p=0.95", top_p=0.95),
    Target("top 64, high_entropy 0.5", positions="high_entropy"),
    Target("top 32 + 16 sampled ids", k=32, num_sampled=16),
    Target("50 sampled ids", k=0, num_sampled=50),
    Target("25 sampled ids", k=0, num_sampled=25),
    DENSE,
)


def bytes_a_token(params: Params, target: Target) -> float:
    """Of the targets alone; dense ones as float16, plain."""
    if target.targets == "none":
        return 0.0
    if target.targets == "online":
        return 2.0 * target.k
    reader = CacheReader(params.paths.logits, CorpusSplit(params.paths.corpus, "train"))
    return reader.num_bytes() / (reader.fingerprint.num_rows * reader.fingerprint.row_length)


def keep_all_unsorted(
    values: Tensor, k: int, maxima: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`block_top_k`, but all ids as they come: sorting whole rows would take most of a step."""
    if k < values.shape[-1]:
        return block_top_k(values, k, maxima)
    return values.clone(), torch.arange(k).expand(values.shape)


def train_one(target: Target, work: Path, seed: int, steps: int) -> None:
    """Capture if need be, and train; with sampled ids, those of seed 0 serve all runs."""
    params = load_params(Path("params.yaml"), target.overrides(work, steps))
    if target.targets == "cached":
        capture_locally(params)
    run_training(params.model_copy(update={"seed": seed}), target.run_name(seed), overwrite=True)


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {sd:.{digits}f}"


def way(scores: dict[str, list[Scores]], name: str, field: str) -> str:
    """Share of the way from cross-entropy to dense, by means."""
    mean = {
        key: statistics.mean(getattr(score, field) for score in scores[key])
        for key in (CROSS_ENTROPY.name, DENSE.name, name)
    }
    start, end = mean[CROSS_ENTROPY.name], mean[DENSE.name]
    return f"{(start - mean[name]) / (start - end):.0%}"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("cache/quality"))
@click.option("--seeds", default=3)
@click.option("--steps", default=48)
def main(work: Path, seeds: int, steps: int) -> None:
    """Train, evaluate, print the table of docs/benchmarks.md."""
    with patch.object(block_search, "block_top_k", keep_all_unsorted):
        compare_targets(work, seeds, steps)


def compare_targets(work: Path, seeds: int, steps: int) -> None:
    """Everything; what is finished already is not made again."""
    params = load_params(Path("params.yaml"))
    corpus = CorpusSplit(params.paths.corpus, "validation")
    vocab_size = corpus.info.vocab_size
    targets = [t if t != DENSE else replace(t, k=vocab_size) for t in TARGETS]
    for seed in range(seeds):
        for target in targets:
            train_one(target, work, seed, steps)
    device = torch.device("cpu")
    teacher = HuggingFaceTeacher(
        params.paths.teacher,
        vocab_size=vocab_size,
        dtype=teacher_dtype(params, device),
        device=device,
    )
    scores: dict[str, list[Scores]] = {}
    for target in targets:
        names = [target.run_name(seed) for seed in range(seeds)]
        folders = {name: work / "runs" / name / "model" for name in names}
        models = open_models(
            folders,
            corpus,
            params.paths.teacher,
            dtypes=dict.fromkeys(folders, teacher.dtype),
            device=device,
        )
        found = compare(
            teacher, models, corpus, params.evaluate, params.prepare.document_mask
        ).scores
        scores[target.name] = [found[name] for name in names]
    print("| | bytes | loss | KL to teacher | agreement | ECE | way: loss | way: KL |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for target in targets:
        of = scores[target.name]
        size = bytes_a_token(
            load_params(Path("params.yaml"), target.overrides(work, steps)), target
        )
        print(
            f"| {target.name} | {size:,.1f} | {spread([s.loss for s in of], 4)} "
            f"| {spread([s.kl_to_teacher for s in of], 4)} "
            f"| {spread([100 * s.top1_agreement for s in of], 2)} % "
            f"| {spread([s.calibration_error for s in of], 4)} "
            f"| {way(scores, target.name, 'loss')} | {way(scores, target.name, 'kl_to_teacher')} |"
        )


if __name__ == "__main__":
    main()
