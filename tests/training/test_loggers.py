"""The curves of a run in other logs: the values of DVCLive's, also after an interruption."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.params import Params
from pipeline.errors import DecantError
from pipeline.runtime import optional
from pipeline.training import loggers
from pipeline.training.run import run_training
from tests.helpers import change, losses, run_with_power_cut

Curves = dict[str, tuple[list[float], list[float]]]


def read_tensorboard(run: Path) -> Curves:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    curves: Curves = {}
    for name in events.Tags()["scalars"]:
        points = events.Scalars(name)
        curves[name] = ([p.step for p in points], [p.value for p in points])
    return curves


def read_mlflow(run: Path) -> Curves:
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("decant")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.steps"] == "8"
    curves: Curves = {}
    for name in found.data.metrics:
        points = client.get_metric_history(found.info.run_id, name)
        curves[name] = ([p.step for p in points], [p.value for p in points])
    return curves


def records_of(file: Path) -> Iterator[bytes]:
    """The records of a log of wandb, in LevelDB's format: blocks of parts with their sizes."""
    data, block, header = file.read_bytes(), 32_768, 7
    place, parts = header, b""  # the file has a header of its own
    while place + header <= len(data):
        if block - place % block < header:  # the rest of a block holds no part
            place += block - place % block
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + header])
        parts += data[place + header : place + header + size]
        place += header + size
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


def read_wandb(run: Path) -> Curves:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    curves: Curves = {}
    for data in records_of(file):
        items = Record.FromString(data).history.item
        values = {item.key or "/".join(item.nested_key): item.value_json for item in items}
        for name, value in values.items():
            if not name.startswith("_"):
                points = curves.setdefault(name, ([], []))
                points[0].append(int(values["_step"]))
                points[1].append(float(value))
    return curves


READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb}


@pytest.mark.parametrize("name", READERS)
def test_a_logger_has_the_curves_of_dvclive(name: str, tiny_cache: Params) -> None:
    """Also of a run that was stopped and continued, of which nothing is there twice."""
    pytest.importorskip(name)
    params = change(tiny_cache, run={"report_to": [name], "checkpoint_every": 2})
    run_with_power_cut(params, "student", before_step=5)
    run_training(params, "student")
    folder = params.paths.runs / "student"
    found = READERS[name](folder)
    for curve, (steps, values) in losses(folder).items():
        assert found[curve][0] == steps
        assert found[curve][1] == pytest.approx(values, rel=1e-5), curve


def test_loggers_change_no_run(tiny_cache: Params) -> None:
    """A finished run stays finished under another `report_to`; --overwrite removes its logs."""
    run_training(tiny_cache, "student")
    pytest.importorskip("tensorboard")
    logged = change(tiny_cache, run={"report_to": ["tensorboard"]})
    assert run_training(logged, "student").state is None
    other = change(logged, train={"steps": 4})
    run_training(other, "student", overwrite=True)
    folder = tiny_cache.paths.runs / "student"
    assert (folder / "tensorboard").is_dir()
    run_training(change(tiny_cache, train={"steps": 2}), "student", overwrite=True)
    assert not (folder / "tensorboard").exists()


class Failing:
    """A logger whose server is gone from step 2 on."""

    def __init__(self, run: Path, config: Any) -> None:
        self.steps: list[int] = []

    def show(self, step: int, values: Any) -> None:
        if step == 2:
            raise OSError("no route to host")

    def close(self, *, finished: bool) -> None:
        raise AssertionError("it was dropped")


def test_a_logger_that_fails_stops_no_training(
    tiny_cache: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Failing)
    state = run_training(change(tiny_cache, run={"report_to": ["wandb"]}), "student").state
    assert state is not None
    assert state.step == 8
    said = capsys.readouterr().out
    assert said.count("warning: Failing fails (no route to host)") == 1


def test_a_logger_that_cannot_be_opened_is_one_sentence(
    tiny_cache: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_key(run: Path, config: Any) -> Any:
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", no_key)
    with pytest.raises(
        DecantError, match=r"report_to=wandb cannot be opened \(no API key"
    ) as error:
        run_training(change(tiny_cache, run={"report_to": ["wandb"]}), "student")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", READERS)
def test_a_missing_library_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> Any:
        raise ImportError(f"No module named {package!r}")

    monkeypatch.setattr(optional, "import_module", missing)
    with pytest.raises(DecantError, match=rf"run\.report_to={name} needs .*\.\[{name}\]"):
        loggers.LOGGERS[name](tmp_path, {})


def test_values_have_their_dotted_names() -> None:
    nested = {"train": {"steps": 8, "betas": [0.9, 0.95]}, "seed": 0}
    assert loggers.flat(nested) == {"train.steps": 8, "train.betas": [0.9, 0.95], "seed": 0}
