"""Where training curves go besides DVCLive's files: TensorBoard, Weights & Biases, MLflow.

Each is written by its own library, an extra of the same name, into the run's folder:

tensorboard  <run>/tensorboard, for `tensorboard --logdir cache/runs`
wandb        <run>/wandb, offline, to be uploaded by `wandb sync`; WANDB_MODE=online does it at once
mlflow       <run>/mlflow.db, for `mlflow ui --backend-store-uri sqlite:///<run>/mlflow.db`;
             MLFLOW_TRACKING_URI names a server instead

A continued run writes its whole history again (pipeline/training/curves.py), so the log of its
first part is removed, by MLflow also on a server. What wandb has uploaded remains.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.train_params import ReportTo
from pipeline.io.files import write_bytes
from pipeline.runtime.optional import require

FOLDERS = ("tensorboard", "wandb", "mlflow.db", "mlflow.txt")
"""What the loggers leave in a run's folder."""

_PROJECT = "decant"


class Logger(Protocol):
    """A log of one run."""

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""

    def close(self, *, finished: bool) -> None:
        """Write what is pending; `finished` is False if training was stopped or has failed."""


class TensorBoard:
    """Event files, by torch.utils.tensorboard."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        require("tensorboard", "tensorboard", "run.report_to=tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer: Any = SummaryWriter(str(folder))
        text = "".join(f"    {name}: {value}\n" for name, value in flat(config).items())
        self._writer.add_text("params", text)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, finished: bool) -> None:
        """See `Logger`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, offline unless WANDB_MODE says otherwise."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        wandb = require("wandb", "wandb", "run.report_to=wandb")
        shutil.rmtree(run / "wandb", ignore_errors=True)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            dir=str(run),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._run.log(dict(values), step=step)

    def close(self, *, finished: bool) -> None:
        """See `Logger`."""
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run in a local database, or on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        mlflow = require("mlflow", "mlflow", "run.report_to=mlflow")
        local = f"sqlite:///{(run / 'mlflow.db').absolute()}"
        self._client: Any = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", local))
        earlier = run / "mlflow.txt"
        if earlier.exists():
            with suppress(mlflow.MlflowException):  # another server, or deleted there
                self._client.delete_run(earlier.read_text())
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._id: str = self._client.create_run(experiment, run_name=run.name).info.run_id
        write_bytes(earlier, self._id.encode())
        for key, value in flat(config).items():
            self._client.log_param(self._id, key, value)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self, *, finished: bool) -> None:
        """See `Logger`."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


LOGGERS: dict[ReportTo, type[TensorBoard | WeightsAndBiases | MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted names, as `--set` takes them."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
