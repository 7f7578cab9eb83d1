"""Eight runs of a sweep on one cache against eight with the live teacher: wall time, all included.

    python tests/benchmarks/sweep_cost.py [--runs 8] [--steps 48]

Needs the demo's teacher and corpus. The cached side pays for capture and runs, the online
side for its runs alone. Runs differ in learning rate, as a sweep's would; both sides take turns, so
that a machine that is busy for a while is so for both.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import click

from pipeline.capture.local import capture_locally
from pipeline.config.params import load_params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.training.run import run_training


@click.command()
@click.option("--runs", default=8, help="Runs of the sweep.")
@click.option("--steps", default=48, help="Steps a run.")
def main(runs: int, steps: int) -> None:
    """Time both sides."""
    seconds: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        common = [
            f"paths.logits={folder}/logits",
            f"paths.runs={folder}/runs",
            f"train.steps={steps}",
            f"train.eval_every={steps}",
        ]
        params = load_params(Path("params.yaml"), common)
        started = time.perf_counter()
        capture_locally(params)
        seconds["capture"] = time.perf_counter() - started
        for number in range(runs):
            for teacher in ("cached", "online"):
                rate = 0.0005 * 1.2**number
                changes = [f"train.targets={teacher}", f"train.learning_rate={rate}"]
                name = f"{teacher}-{number}"
                started = time.perf_counter()
                run_training(load_params(Path("params.yaml"), common + changes), name)
                seconds[teacher] += time.perf_counter() - started
                shutil.rmtree(Path(folder) / "runs" / name)
    rows = len(CorpusSplit(params.paths.corpus, "train"))
    epochs = (
        runs * steps * params.train.batch_rows * params.train.gradient_accumulation_steps / rows
    )
    cached = seconds["capture"] + seconds["cached"]
    print(
        f"{runs} runs of {steps} steps, {epochs:.1f} epochs in all\n"
        f"capture {seconds['capture']:.0f} s, cached runs {seconds['cached']:.0f} s, online runs "
        f"{seconds['online']:.0f} s\n"
        f"online over cached, capture included: {seconds['online'] / cached:.2f}; a run alone: "
        f"{seconds['online'] / seconds['cached']:.2f}"
    )


if __name__ == "__main__":
    main()
