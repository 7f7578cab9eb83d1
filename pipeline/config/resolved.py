"""Compute the parameters that depend on the corpus or on others. This is the only place that does.

    train.epochs             train.steps = ceil(epochs x training rows / rows per step)
    student.vocab_size=auto  the tokenizer's ids, rounded up to a multiple of 64, since matrix
                             products are fastest in whole tiles
    student.head_dim=auto    student.hidden_size / student.num_heads

A run is identified by these numbers, so equal runs are equal however they were requested.
"""

from __future__ import annotations

import math

from pydantic import ValidationError

from pipeline.config.params import Params
from pipeline.config.train_params import StudentParams, TrainParams
from pipeline.errors import ParamsError

_MULTIPLE = 64


def resolve(params: Params, *, train_rows: int, num_ids: int) -> Params:
    """Return the same parameters with numbers in place of `auto` and of `train.epochs`.

    Args:
        train_rows: number of rows in the corpus's training split.
        num_ids: number of ids of its tokenizer: the largest id + 1.

    Raises:
        ParamsError: the schedule does not fit into the steps of train.epochs, or a student that
            starts at random has no whole number for student.head_dim=auto.
    """
    student = params.student
    if student.vocab_size == "auto":
        student = student.model_copy(update={"vocab_size": padded_vocabulary(num_ids)})
    if student.head_dim == "auto":
        student = student.model_copy(update={"head_dim": _head_dim(student)})
    train = _in_steps(params.train, train_rows)
    return params.model_copy(update={"student": student, "train": train})


def padded_vocabulary(num_ids: int) -> int:
    """Return the number of rows for `student.vocab_size=auto`."""
    return math.ceil(num_ids / _MULTIPLE) * _MULTIPLE


def _head_dim(student: StudentParams) -> int:
    """Return the width of a head for `student.head_dim=auto`."""
    width, rest = divmod(student.hidden_size, student.num_heads)
    if rest and student.init == "random":
        raise ParamsError(
            f"student.hidden_size={student.hidden_size} is not divisible by student.num_heads="
            f"{student.num_heads}, so student.head_dim=auto is not a whole number: change one of "
            "them, or set student.head_dim and student.qk_norm=true"
        )
    return width


def _in_steps(train: TrainParams, train_rows: int) -> TrainParams:
    if train.steps is not None:
        return train
    assert train.epochs is not None
    steps = math.ceil(
        train.epochs * train_rows / (train.batch_rows * train.gradient_accumulation_steps)
    )
    try:
        return TrainParams.model_validate(train.model_dump() | {"steps": steps, "epochs": None})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ParamsError(
            f"train.epochs={train.epochs:g} over {train_rows:,} rows does not suit the schedule: "
            f"{reason}"
        ) from None
