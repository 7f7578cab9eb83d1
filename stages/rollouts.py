"""Let a model continue prompts, for on-policy distillation: `python stages/rollouts.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import stage, writes
from pipeline.errors import ParamsError, printable

if TYPE_CHECKING:
    from pipeline.config.params import Params

_SHOWN = 70  # characters of the example


@stage
@writes("rollouts")
@click.option("--run", help="The run under paths.runs whose model writes.  [default: student]")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="The Hugging Face folder of the model that writes, instead of a run's.",
)
@click.option("--teacher", "by_teacher", is_flag=True, help="The teacher writes, instead of a run.")
@click.option("--overwrite", is_flag=True, help="Discard rollouts made from other inputs.")
def main(
    params: Params, run: str | None, model: Path | None, by_teacher: bool, overwrite: bool
) -> None:
    """Let a student or the teacher continue prompts, and write the rollouts as a corpus.

    The corpus, paths.rollouts/corpus.zarr, holds prompts and the tokens as they were sampled, of
    which only the latter are in the loss; set paths.corpus to it for prepare, verify and train.
    Continues after a crash or Ctrl-C. Reads rollouts.*, seed, the teacher's tokenizer and a model
    folder; writes paths.rollouts. Run by hand or by docs/recipes/on-policy.
    """
    from pipeline.generation.rollouts import make_rollouts
    from pipeline.model.model_dtype import model_dtype
    from pipeline.model.named_models import model_folder, teacher_model
    from pipeline.runtime.device import dtype_name, pick_device

    if sum((run is not None, model is not None, by_teacher)) > 1:
        raise ParamsError("--run, --model and --teacher each name the model: give one of them")
    if by_teacher:
        folder = teacher_model(params.paths.teacher)
    else:
        folder = model_folder(params.paths.runs, run or "student", model)
    device = pick_device(params.device)
    dtype = model_dtype(params.rollouts.dtype, folder, device, key="rollouts.dtype")
    done = make_rollouts(params, folder, dtype=dtype, device=device, overwrite=overwrite)
    if done is None:
        return
    for name, info in done.splits.items():
        click.echo(
            f"rollouts: {name} {info.num_documents:,} rollouts in {info.num_rows:,} rows, "
            f"{info.num_in_loss:,} of {info.num_tokens:,} tokens in the loss, "
            f"{info.num_padding / info.num_positions:.1%} padding"
        )
    prompt, rollout = (printable(repr(text)) for text in done.example)
    click.echo(f"  the first one: ...{prompt[-_SHOWN:]} -> {rollout[:_SHOWN]}...")
    click.echo(
        f"rollouts: {done.num_ended:,} of {done.num_rollouts:,} ended by themselves, the others "
        f"are cut at rollouts.max_new_tokens={params.rollouts.max_new_tokens}; "
        f"{done.new_tokens:,} of {done.num_tokens:,} tokens sampled now, "
        f"{done.new_tokens / max(done.seconds, 1e-9):.1f} tokens/s in {dtype_name(dtype)}; "
        f"{done.corpus}"
    )


if __name__ == "__main__":
    main()
