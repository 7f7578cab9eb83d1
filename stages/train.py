"""Train a student from the cache, a live teacher, or no teacher: `python stages/train.py`.

On several GPUs: `torchrun --nproc-per-node 4 stages/train.py`, with run.parallel=ddp or fsdp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.cli import stage

if TYPE_CHECKING:
    from pipeline.config.params import Params


@stage
@click.option("--run", default="student", help="Name of the run's folder under paths.runs.")
@click.option(
    "--overwrite", is_flag=True, help="Replace a run of that name made from other parameters."
)
def main(params: Params, run: str, overwrite: bool) -> None:
    """Train a student with alpha tau^2 KL + (1 - alpha) CE.

    Continues exactly after a crash or Ctrl-C. Started by torchrun, several processes share the
    work, with the same losses as one. train.targets chooses the cache (`cached`), the live
    teacher (`online`) or plain language modelling (`none`). Reads train.*, run.*, student.*, seed,
    paths.corpus and paths.logits; writes paths.runs/RUN.
    """
    from pipeline.runtime.console import say
    from pipeline.training.run import run_training

    result = run_training(params, run, overwrite=overwrite)
    if result.state is None:
        say(f"train: {result.folder} was finished already; --overwrite does not repeat it")
        return
    first, last = (
        next(r["validation/loss"] for r in records if "validation/loss" in r)
        for records in (result.state.history, result.state.history[::-1])
    )
    state, trained = result.state, ""
    if result.trained_parameters < result.parameters:
        trained = f" ({result.trained_parameters / 1e6:.2f} M in merged adapters)"
    if state.best_loss is not None:
        say(
            f"train.keep_best: kept step {state.best_step}, which has the lowest validation loss, "
            f"{state.best_loss:.4f}"
        )
    say(
        f"train: {result.folder / 'model'} holds {result.parameters / 1e6:.1f} M parameters"
        f"{trained}, "
        f"validation loss {first:.4f} -> {last:.4f} in {state.step} steps in "
        f"{result.dtype}, "
        f"{state.skipped} skipped"
    )


if __name__ == "__main__":
    main()
