"""Run lm-evaluation-harness on model folders: its tasks, its HFLM, its numbers.

Decant calls the harness's `evaluate` instead of `simple_evaluate`, which does the same but, for
each model, also asks the hub for the model's commit, git for the folder's and pip for the
environment, none of which is used here. Tasks are loaded once for all models, before anything is
run, so that a wrong name or an unreachable data set is reported at once. Models are loaded as
everywhere in Decant, only from safetensors. No code of a model folder or data set is run, and tasks
that run what a model wrote are refused.
"""

from __future__ import annotations

import difflib
import logging
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import DecantError, ParamsError, memory_shortage, reason_of
from pipeline.evaluation.results import HarnessResults, TaskMetric
from pipeline.model.huggingface import load_causal_lm
from pipeline.model.tokenizer import load_tokenizer
from pipeline.runtime.console import say
from pipeline.runtime.device import place_rounded
from pipeline.runtime.optional import require

_SEED = 1234  # the harness's own seed, for its draws of examples and for numpy and PyTorch
_REPLICATES = 1000  # replicates of its bootstrap, for metrics without an error formula


class Harness:
    """Loaded tasks of the harness.

    Args:
        names: tasks, groups or tags.
        folder: the user's own task files (.yaml), which take precedence over the harness's.
        shots: examples before each question; None for each task's own number.
        limit: questions per task; None for all.

    Raises:
        ParamsError: a task does not exist, or it runs code that the model writes.
        DecantError: the harness is not installed, or a task's data cannot be read.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        folder: Path | None = None,
        shots: int | None = None,
        limit: int | None = None,
    ) -> None:
        _import_lm_eval()
        self._limit = limit
        self._tasks = _load([name.strip() for name in names], folder)
        for name, task in self._tasks["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ParamsError(
                    f"the task {name} runs code that the model writes, without a sandbox: leave it "
                    "out of --lm-eval"
                )
            set_shots(task, shots)

    def run(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_rows: int,
        dequantize: bool = False,
    ) -> HarnessResults:
        """Return the scores of the model in a Hugging Face folder.

        Args:
            dequantize: convert quantised weights to `dtype`.

        Raises:
            DecantError: the folder is not a model, or the harness cannot run it.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        model = load_causal_lm(folder, dtype, what="model", device=device, dequantize=dequantize)
        model = place_rounded(model, dtype, device)
        seed_as_the_harness()
        try:
            lm = HFLM(
                pretrained=model,
                tokenizer=load_tokenizer(folder),
                backend="causal",
                batch_size=batch_rows,
                trust_remote_code=False,
            )
            found = evaluate(
                lm=lm,
                task_dict=self._tasks,
                limit=self._limit,
                bootstrap_iters=_REPLICATES,
                log_samples=False,
            )
        except Exception as error:  # tasks are programs and can raise anything
            if memory_shortage(error):
                raise
            raise DecantError(
                f"lm-evaluation-harness fails on {folder} ({_reason(error)}): leave the task out, "
                "or fix it"
            ) from error
        results = {task: read_metrics(values) for task, values in found["results"].items()}
        return {task: metrics for task, metrics in results.items() if metrics}


def _import_lm_eval() -> None:
    lm_eval = require("lm_eval", "lm-eval", "--lm-eval")
    logging.getLogger(lm_eval.__name__).setLevel(logging.ERROR)


def _load(names: Sequence[str], folder: Path | None) -> dict[str, Any]:
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    manager = None
    if folder is not None:
        if not folder.is_dir():
            raise ParamsError(f"--lm-eval-folder {folder} is no folder: name one with task files")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_tasks):
        say("  reading the harness's task files, which takes a while")
        manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f", did you mean {' or '.join(close)}" if close else ""
            raise ParamsError(
                f"lm-evaluation-harness knows no task {name!r}{hint}: `lm-eval ls tasks` lists "
                "them, --lm-eval-folder adds your own"
            )
    try:
        loaded: dict[str, Any] = dict(manager.load(list(names)))
    except Exception as error:  # reading a data set can raise errors of many libraries
        raise DecantError(
            f"the task {', '.join(names)} cannot be loaded ({_reason(error)}): check the "
            "connection to the hub, or its files"
        ) from error
    return loaded


def set_shots(task: Any, shots: int | None) -> None:
    """Set the examples before each question as `simple_evaluate` does: a task's own 0 stays."""
    said = task.get_config("num_fewshot")
    if shots is not None and said != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif said is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)


def seed_as_the_harness() -> None:
    """Set the seeds that the harness's command line sets before each model."""
    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


def read_metrics(values: Mapping[str, Any]) -> dict[str, TaskMetric]:
    """Group the harness's metrics with their standard errors.

    {"acc,none": 0.5, "acc_stderr,none": 0.1, ...} -> {"acc": TaskMetric(0.5, 0.1)}.
    If the filter of the model's answers is not "none", it stays in the name.
    """
    metrics = {}
    for key, value in values.items():
        metric, has_filter, how = key.partition(",")
        number = _number(value)
        if not has_filter or metric.endswith("_stderr") or number is None:
            continue
        error = _number(values.get(f"{metric}_stderr,{how}"))
        metrics[metric if how == "none" else key] = TaskMetric(number, error)
    return metrics


def _number(value: Any) -> float | None:
    """Return a finite float; None for text such as N/A."""
    is_number = isinstance(value, int | float | np.number) and math.isfinite(value)
    return float(value) if is_number else None


def _reason(error: Exception) -> str:
    return reason_of(error, 300)
