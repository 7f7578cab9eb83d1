"""Training in float16 and bfloat16 against float32: one student, cache and order of rows.

    python tests/benchmarks/float16_curve.py [--steps 100] [--size 64]

Needs the demo's teacher and corpus (`dvc repro corpus`), and captures a cache of its own. The
student is small and starts at random, since a CPU without units for a format emulates it. Each run
begins with the same weights and sees the same rows. Printed are the largest and the mean relative
difference of the training loss from that in float32 over all steps, the difference at the last
validation, and in float16 how the loss scale went.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from pipeline.capture.local import capture_locally
from pipeline.config.params import load_params
from pipeline.training.run import run_training

DTYPES = ("float32", "float16", "bfloat16")


def curve(history: list[dict[str, float]], name: str) -> list[float]:
    return [point[name] for point in history if name in point]


@click.command()
@click.option("--steps", default=100, help="Steps of each run.")
@click.option("--size", default=64, help="The student's hidden size, a multiple of 16.")
def main(steps: int, size: int) -> None:
    """Train in each format and compare the curves."""
    histories = {}
    with tempfile.TemporaryDirectory() as folder:
        student = {
            "init": "random",
            "hidden_size": size,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 2 * size,
        }
        common = [
            f"paths.logits={folder}/logits",
            f"paths.runs={folder}/runs",
            *(f"student.{name}={value}" for name, value in student.items()),
            f"train.steps={steps}",
            "train.log_every=1",
            f"train.eval_every={steps}",
        ]
        capture_locally(load_params(Path("params.yaml"), common))
        for dtype in DTYPES:
            params = load_params(Path("params.yaml"), [*common, f"train.dtype={dtype}"])
            state = run_training(params, dtype).state
            assert state is not None
            histories[dtype] = state.history
    wanted = curve(histories["float32"], "train/loss")
    print(f"float32: training loss {wanted[0]:.4f} at first, {wanted[-1]:.4f} after {steps} steps")
    for dtype in DTYPES[1:]:
        found = curve(histories[dtype], "train/loss")
        differences = [abs(b / a - 1.0) for a, b in zip(wanted, found, strict=True)]
        one, two = (curve(histories[name], "validation/loss")[-1] for name in ("float32", dtype))
        print(
            f"{dtype} against float32: training loss at most {max(differences):.1e} off, "
            f"{sum(differences) / len(differences):.1e} on average; validation loss "
            f"{one:.4f} and {two:.4f}, {abs(two / one - 1.0):.1e} off"
        )
    last = histories["float16"][-1]
    print(
        f"loss scale {last['train/loss_scale']:,.0f}, {last['train/overflowed_steps']:.0f} steps "
        "skipped for overflow"
    )


if __name__ == "__main__":
    main()
