"""Compute the parameters that depend on the corpus. This is the only place that does so.

    train.epochs             train.steps = ceil(epochs x training rows / rows per step)
    student.vocab_size=auto  the tokenizer's ids, rounded up to a multiple of 64, since matrix
                             products are fastest in whole tiles

A run is identified by these numbers, so equal runs are equal however they were requested.
"""

from __future__ import annotations

import math

from pydantic import ValidationError

from pipeline.config.params import Params
from pipeline.config.train_params import TrainParams
from pipeline.errors import ParamsError

_MULTIPLE = 64


def resolve(params: Params, *, train_rows: int, num_ids: int) -> Params:
    """Return the same parameters with `train.steps` and `student.vocab_size` as numbers.

    Args:
        train_rows: number of rows in the corpus's training split.
        num_ids: number of ids of its tokenizer: the largest id + 1.

    Raises:
        ParamsError: the schedule does not fit into the steps of train.epochs.
    """
    student = params.student
    if student.vocab_size == "auto":
        student = student.model_copy(update={"vocab_size": padded_vocabulary(num_ids)})
    train = _in_steps(params.train, train_rows)
    return params.model_copy(update={"student": student, "train": train})


def padded_vocabulary(num_ids: int) -> int:
    """Return the number of rows for `student.vocab_size=auto`."""
    return math.ceil(num_ids / _MULTIPLE) * _MULTIPLE


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
