"""The training loop: `train` -> `_train_step` -> `_forward_backward`, to be read in that order.

One optimizer step divides the summed loss of all its micro-batches ONCE, by the number of unmasked
tokens in all of them, so accumulation changes nothing but memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from dvclive import Live
from scmrepo.exceptions import SCMError

from pipeline.config import TrainParams
from pipeline.data.packing import IGNORE
from pipeline.errors import DecantError
from pipeline.losses.chunked import LossSums, distillation_loss_sums
from pipeline.model.student import StudentModel
from pipeline.runtime import StopRequest, progress, say
from pipeline.teacher.base import Teacher
from pipeline.training.batches import Batch, BatchStream, first_rows
from pipeline.training.checkpoint import Checkpoints, TrainState
from pipeline.training.optim import build_optimizer, learning_rate


@dataclass(frozen=True)
class Validation:
    """Where the student is validated: a split and, for KL, the teacher's view of it."""

    teacher: Teacher
    rows: int  # how many rows are looked at, from the first


def train(
    student: StudentModel,
    stream: BatchStream,
    validation: Validation,
    params: TrainParams,
    run: Path,
    checkpoints: Checkpoints,
    dtype: torch.dtype,
) -> TrainState:
    """Train to `params.steps`, continuing the newest checkpoint if there is one.

    A continued run logs and ends exactly as one that was never stopped. Ctrl-C (or SIGTERM) ends
    after the step under way, with a checkpoint.

    Args:
        student: on its device, float32 parameters; trained in place.
        run: the run's folder, where curves are written.
        dtype: of autocast and of the head's factors; losses are float32.

    Raises:
        DecantError: more than `max_skipped_steps` steps had a non-finite loss or gradient.
    """
    optimizer = build_optimizer(student, params)
    state = checkpoints.load_newest(student, optimizer) or TrainState()
    if state.step:
        say(f"continuing from step {state.step} of {params.steps}")
    batches = stream.starting_at(state.step * params.accumulation)
    with _open_log(run / "dvclive") as live, StopRequest() as stop:
        for record in state.history:
            _show(live, record)
        if state.step == 0:
            _record(live, state, validate(student, validation, params, dtype))
        bar = progress(range(state.step, params.steps), what="train", unit="step")
        for step in bar:
            values = _train_step(student, optimizer, batches, step, state, params, dtype)
            state.step = step + 1
            bar.set_postfix_str(f"loss {values['train/loss']:.3f}", refresh=False)
            due = state.step % params.eval_every == 0 or state.step == params.steps
            if due:
                values |= validate(student, validation, params, dtype)
                shown = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if "validation" in k)
                say(f"step {state.step}/{params.steps}: {shown}")
            if due or state.step % params.log_every == 0:
                _record(live, state, values)
            if state.step % params.checkpoint_every == 0 or stop.requested:
                checkpoints.save(student, optimizer, state)
            if stop.requested:
                raise KeyboardInterrupt
    return state


def _train_step(
    student: StudentModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    step: int,
    state: TrainState,
    params: TrainParams,
    dtype: torch.dtype,
) -> dict[str, float]:
    """One optimizer step over `accumulation` micro-batches; returns what is worth logging."""
    started = time.perf_counter()
    rate = learning_rate(step, params)
    for group in optimizer.param_groups:
        group["lr"] = rate
    micro_batches = list(islice(batches, params.accumulation))
    waited = time.perf_counter() - started
    num_labels = sum(batch.num_labels for batch in micro_batches)
    sums = [
        _forward_backward(student, batch, num_labels, params, dtype)
        for batch in micro_batches
        if batch.num_labels
    ]
    total, ce, kl = (
        float(sum(getattr(part, name) for part in sums)) / max(1, num_labels)
        for name in ("total", "ce", "kl")
    )
    norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), params.clip_norm))
    if math.isfinite(total) and math.isfinite(norm):
        optimizer.step()
    else:
        state.skipped += 1
        if state.skipped > params.max_skipped_steps:
            raise DecantError(
                f"{state.skipped} steps had a non-finite loss or gradient, the limit is "
                f"train.max_skipped_steps={params.max_skipped_steps}: lower train.learning_rate"
            )
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    return {
        "train/loss": total,
        "train/ce": ce,
        **({"train/kl": kl} if params.teacher != "none" else {}),
        "train/learning_rate": rate,
        "train/gradient_norm": norm,
        "train/skipped_steps": float(state.skipped),
        "train/tokens_per_second": sum(b.tokens.numel() for b in micro_batches) / seconds,
        "train/data_wait": waited / seconds,
    }


def _forward_backward(
    student: StudentModel, batch: Batch, num_labels: int, params: TrainParams, dtype: torch.dtype
) -> LossSums:
    """Gradients of this micro-batch's share of the mean loss are added to the parameters."""
    sums = _losses(student, batch, params, dtype)
    (sums.total / num_labels).backward()  # type: ignore[no-untyped-call]
    return LossSums(total=sums.total.detach(), ce=sums.ce, kl=sums.kl)


def _losses(
    student: StudentModel, batch: Batch, params: TrainParams, dtype: torch.dtype
) -> LossSums:
    """Loss sums over the batch's unmasked positions."""
    device = student.head_weight.device
    labels = batch.labels.to(device, non_blocking=True)
    wanted = labels != IGNORE
    doc_ids = batch.doc_ids
    if doc_ids is not None:
        doc_ids = doc_ids.to(device, non_blocking=True)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        hidden = student.hidden_states(batch.tokens.to(device, non_blocking=True), doc_ids)
    topk = None
    if batch.topk is not None:
        topk = batch.topk.map(lambda t: t.to(device, non_blocking=True))[wanted]
    return distillation_loss_sums(
        hidden[wanted],
        student.head_weight,
        labels[wanted],
        topk,
        alpha=params.alpha,
        temperature=params.temperature,
        dtype=dtype,
        chunk=params.head_chunk,
    )


@torch.no_grad()
def validate(
    student: StudentModel, validation: Validation, params: TrainParams, dtype: torch.dtype
) -> dict[str, float]:
    """Mean cross-entropy and, with a teacher, tail-bucket KL at temperature 1, nats a token."""
    at_one = params.model_copy(update={"temperature": 1.0})
    ce, kl, count = 0.0, 0.0, 0
    student.eval()
    has_teacher = False
    for batch in first_rows(validation.teacher, validation.rows, params.batch_rows):
        if not batch.num_labels:
            continue
        has_teacher = batch.topk is not None
        sums = _losses(student, batch, at_one, dtype)
        ce, kl, count = ce + float(sums.ce), kl + float(sums.kl), count + batch.num_labels
    student.train()
    if not count:
        raise DecantError("the validation rows hold no position in the loss: enlarge the corpus")
    values = {"validation/loss": ce / count}
    return values | ({"validation/kl": kl / count} if has_teacher else {})


def retained_mass(batch: Batch, temperature: float) -> float:
    """Mean probability the kept ids hold at a temperature, over unmasked positions."""
    assert batch.topk is not None
    wanted = batch.labels != IGNORE
    topk = batch.topk[wanted.to(batch.topk.lse.device)]
    if topk.draws:  # draws stand for the rest of the mass
        return 1.0
    _, tail = topk.target(temperature)
    return 1.0 - float(tail.mean())


def _open_log(folder: Path) -> Live:
    try:
        return Live(str(folder), save_dvc_exp=False, dvcyaml=None)
    except SCMError as error:
        raise DecantError(
            f"DVCLive cannot use this git repository ({error}): make a first commit"
        ) from None


def _record(live: Live, state: TrainState, values: dict[str, float]) -> None:
    """Log and remember: a resumed run replays its history, so its curves have no gap."""
    record = {"step": float(state.step), **values}
    state.history.append(record)
    _show(live, record)


def _show(live: Live, record: dict[str, float]) -> None:
    live.step = int(record["step"])
    for name, value in record.items():
        if name != "step":
            live.log_metric(name, value)
    live.make_summary()
