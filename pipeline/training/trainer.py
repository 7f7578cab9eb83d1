"""The training loop; read it in the order `train` -> `_train_step` -> `_forward_backward`.

One optimizer step divides the summed loss of all its micro-batches on all ranks ONCE, by the total
number of unmasked tokens. So accumulation and the number of ranks change only time and memory.
Where only some of these have a target (prepare.positions), the divergence is the mean over those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config.params import Params
from pipeline.config.train_params import TrainParams
from pipeline.errors import DecantError
from pipeline.model.student import Student
from pipeline.runtime.console import StopRequest, announce, progress, say
from pipeline.runtime.device import seconds_of
from pipeline.runtime.ranks import Ranks
from pipeline.training.batches import Batch, BatchStream, first_rows
from pipeline.training.checkpoint import Checkpoints, TrainState
from pipeline.training.curves import Curves
from pipeline.training.dist_checkpoint import Learner
from pipeline.training.distributed import clip_gradients, evaluating, local_gradients
from pipeline.training.loss_scale import LossScale
from pipeline.training.optim import alpha_at, build_optimizer, learning_rate
from pipeline.training.validation import Validation, validate


def train(
    model: nn.Module,
    student: Student,
    stream: BatchStream,
    validation: Validation,
    params: Params,
    folder: Path,
    checkpoints: Checkpoints,
    ranks: Ranks,
) -> TrainState:
    """Train to `train.steps`, continuing from the newest undamaged checkpoint if there is one.

    A continued run logs and ends exactly like one that was never stopped. Ctrl-C or SIGTERM on any
    rank stops all ranks after the same step, with a checkpoint. With `train.keep_best`, the student
    ends with the weights of its lowest validation loss, counted from step 0.

    Args:
        params: the parameters as `pipeline.config.resolved.resolve` returns them, with
            `train.dtype` resolved, too.
        model: the student in its DistillationLoss, as `parallelise` returns it.
        student: the student itself; its parameters are trained in place, under its own names.
        folder: the run's folder, where curves are written.

    Raises:
        DecantError: more than `run.max_skipped_steps` steps had a non-finite loss or gradient, or
            gradients overflow float16 at any loss scale.
    """
    recipe = params.train
    optimizer = build_optimizer(student, recipe)
    learner = Learner(student, optimizer)
    state = checkpoints.load_newest(learner) or TrainState(
        loss_scale=LossScale() if recipe.dtype == "float16" else None
    )
    if state.step:
        say(f"continuing from step {state.step} of {recipe.num_steps}")
    batches = stream.starting_at(state.step * recipe.gradient_accumulation_steps)
    config = params.model_dump(mode="json", include={"seed", "prepare", "student", "train"})
    with Curves(folder, state, params.run.report_to, config) as curves, StopRequest() as stop:
        _announce(model, student, validation, params, state, ranks)
        if state.step == 0:
            curves.record(_validate(model, learner, validation, state, recipe, ranks))
        bar = progress(range(state.step, recipe.num_steps), what="train", unit="step")
        for _ in bar:
            values = _train_step(model, optimizer, batches, state, recipe, ranks)
            _require_few_skipped(state, params)
            state.step += 1
            bar.set_postfix_str(f"loss {values['train/loss']:.3f}", refresh=False)
            due = state.step % recipe.eval_every == 0 or state.step == recipe.num_steps
            if due:
                values |= _validate(model, learner, validation, state, recipe, ranks)
                names = ("loss", "perplexity", "kl")
                found = ((key, values.get(f"validation/{key}")) for key in names)
                shown = [
                    f"validation/{key} {value:.4f}" for key, value in found if value is not None
                ]
                shown += ["the best yet"] if state.best_step == state.step else []
                say(f"step {state.step}/{recipe.num_steps}: {', '.join(shown)}")
            if due or state.step % recipe.log_every == 0:
                curves.record(values)
            stopping = ranks.any(stop.requested)
            if state.step % params.run.checkpoint_every == 0 or stopping:
                checkpoints.save(learner, state)
            if stopping:
                raise KeyboardInterrupt
    if recipe.keep_best:
        learner.restore_best()
    return state


def _validate(
    model: nn.Module,
    learner: Learner,
    validation: Validation,
    state: TrainState,
    params: TrainParams,
    ranks: Ranks,
) -> dict[str, float]:
    """Validate and return the results; with keep_best, keep weights that are the best yet."""
    values = validate(model, validation, params, ranks)
    loss = values["validation/loss"]  # the same on all ranks
    if not params.keep_best:
        return values
    if state.best_loss is None or loss < state.best_loss:
        learner.keep_as_best()
        state.best_step, state.best_loss = state.step, loss
    best = {"step": float(state.best_step or 0), "loss": state.best_loss}
    return values | {f"validation/best_{name}": value for name, value in best.items()}


def _announce(
    model: nn.Module,
    student: Student,
    validation: Validation,
    params: Params,
    state: TrainState,
    ranks: Ranks,
) -> None:
    """Announce the remaining work and estimate its time from one batch without gradients."""
    recipe = params.train

    def load() -> Batch:
        size = recipe.batch_rows
        return next(
            first_rows(validation.source, size, size, rank=ranks.rank, world_size=ranks.world_size)
        )

    batch = load()
    with evaluating(model):
        forward = seconds_of(
            lambda: model(batch, alpha=recipe.alpha, temperature=1.0, divergence="forward_kl"),
            ranks.device,
        )
    loading = seconds_of(load, ranks.device) if recipe.targets == "online" else 0.0
    steps, size = (
        recipe.num_steps - state.step,
        recipe.batch_rows * recipe.gradient_accumulation_steps,
    )
    validations = steps // recipe.eval_every + 1
    rows = min(validation.rows, len(validation.source.corpus))
    checked = validations * math.ceil(rows / recipe.batch_rows)
    a_batch = forwards_a_batch(params) * forward + loading
    announce(
        "train",
        f"takes {steps:,} steps of {size:,} rows to teach {student.count_parameters() / 1e6:.1f} M "
        f"parameters, train.targets={recipe.targets}",
        steps * recipe.gradient_accumulation_steps * a_batch + checked * (forward + loading),
    )


def forwards_a_batch(params: Params) -> int:
    """Return the cost of forward and backward for a batch, in units of one forward.

    A backward costs two forwards (Kaplan et al. 2020, table 1), one of which computes the gradients
    of weights; with adapters, the frozen weights need none. Activation checkpointing repeats the
    forward.
    """
    backward = 1 if params.student.lora else 2
    return 1 + backward + (1 if params.run.activation_checkpointing else 0)


def _train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    state: TrainState,
    params: TrainParams,
    ranks: Ranks,
) -> dict[str, float]:
    """Take one optimizer step over all its micro-batches; return the values to log."""
    started = time.perf_counter()
    rate = learning_rate(state.step, params)
    for group in optimizer.param_groups:
        group["lr"] = rate
    micro_batches = list(islice(batches, params.gradient_accumulation_steps))
    waited = time.perf_counter() - started
    num_labels, num_targets, num_tokens = ranks.sum(
        sum(batch.num_labels for batch in micro_batches),
        sum(batch.num_targets for batch in micro_batches),
        sum(batch.tokens.numel() for batch in micro_batches),
    )
    alpha = alpha_at(state.step, params)
    scale = state.loss_scale.value if state.loss_scale else 1.0
    labels, targets = max(1.0, num_labels), max(1.0, num_targets)
    sums = _forward_backward(model, micro_batches, labels, targets, alpha, scale, params, ranks)
    gradient_norm = clip_gradients(model, params.max_grad_norm, scale)
    # The only wait for a GPU in a step
    total, ce, divergence, norm = torch.stack((*sums, gradient_norm)).tolist()
    total, ce, divergence = ranks.sum(total, ce, divergence)
    total, ce, divergence = total / labels, ce / labels, divergence / targets
    _step_or_skip(optimizer, state, total, norm)
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    return {
        "train/loss": total,
        "train/ce": ce,
        **({"train/divergence": divergence} if params.targets != "none" else {}),
        **({"train/alpha": alpha} if params.alpha_end is not None else {}),
        "train/learning_rate": rate,
        "train/gradient_norm": norm,
        "train/skipped_steps": float(state.skipped),
        **_loss_scale_values(state, scale),
        "train/tokens_per_second": num_tokens / seconds,
        "train/data_wait": waited / seconds,
    }


def _step_or_skip(
    optimizer: torch.optim.Optimizer, state: TrainState, loss: float, norm: float
) -> None:
    """Take the step if loss and gradients are finite; otherwise all ranks skip and count it.

    Gradients that are not finite under a finite loss are an overflow if the loss is scaled, and the
    scale follows. A loss that is not finite would be so at any scale.
    """
    finite = math.isfinite(norm)
    if not math.isfinite(loss) or not (finite or state.loss_scale):
        state.skipped += 1
        return
    if finite:
        optimizer.step()
    if state.loss_scale:
        state.loss_scale.update(overflowed=not finite)


def _loss_scale_values(state: TrainState, used: float) -> dict[str, float]:
    if state.loss_scale is None:
        return {}
    overflowed = float(state.loss_scale.overflowed)
    return {"train/loss_scale": used, "train/overflowed_steps": overflowed}


def _forward_backward(
    model: nn.Module,
    micro_batches: list[Batch],
    num_labels: float,
    num_targets: float,
    alpha: float,
    scale: float,
    params: TrainParams,
    ranks: Ranks,
) -> tuple[Tensor, ...]:
    """Compute gradients of the mean loss over all ranks' labels of the step, times `scale`.

    The divergence is a mean over the positions with a target. As the sum is divided by the number
    of labels, it is weighted by labels per target.

    Returns:
        This rank's sums of the total loss, CE and divergence, float32 scalars on its device.
    """
    sums: tuple[Tensor, ...] = ()
    for number, batch in enumerate(micro_batches, 1):
        with local_gradients(model, last=number == len(micro_batches)):
            losses = model(
                batch,
                alpha=alpha,
                temperature=params.temperature,
                divergence=params.divergence,
                target_weight=num_labels / num_targets,
            )
            # Both engines divide gradients by the number of ranks: see distributed.py.
            (losses[0] * (ranks.world_size * scale) / num_labels).backward()
        own = tuple(loss.detach() for loss in losses)
        sums = tuple(a + b for a, b in zip(sums, own, strict=True)) if sums else own
    return sums


def _require_few_skipped(state: TrainState, params: Params) -> None:
    limit = params.run.max_skipped_steps
    if state.skipped > limit:
        half = state.loss_scale is not None
        range_ends = ", or set train.dtype=float32, since float16 ends at 65,504" if half else ""
        raise DecantError(
            f"{state.skipped} steps had a non-finite loss or gradient, the limit is "
            f"run.max_skipped_steps={limit}: lower train.learning_rate{range_ends}"
        )
