"""Runs side by side: those of folders, those of DVC, what differs, and the pictures."""

from __future__ import annotations

import copy
import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from pipeline.config.params import Params
from pipeline.errors import DecantError
from pipeline.io.files import read_json_object, write_json
from pipeline.report.sweep import (
    SweepRun,
    dvc_experiments,
    experiments_of,
    folder_runs,
    sweep_figures,
    sweep_markdown,
    sweep_rows,
    sweep_scatter,
    varied_keys,
)
from pipeline.training.run import run_training
from tests.helpers import ROOT, change


def made_up(name: str, loss: float, **params: Any) -> SweepRun:
    values = {"seed": 0, "train.steps": 8, **{k.replace("_", ".", 1): v for k, v in params.items()}}
    return SweepRun(name=name, params=values, loss=loss, kl_to_cache=0.25)


def test_runs_made_by_hand_are_found(tiny_cache: Params) -> None:
    run_training(tiny_cache, "student")
    run_training(change(tiny_cache, train={"temperature": 2.0}, run={"checkpoint_every": 4}), "t2")
    run_training(change(tiny_cache, train={"targets": "none", "alpha": 0.3}), "baseline")
    unfinished = tiny_cache.paths.runs / "unfinished"
    write_json(unfinished / "run.json", {"seed": 0})
    t2 = read_json_object(tiny_cache.paths.runs / "t2/dvclive/metrics.json")["model_sha256"]
    judged = {"kl_to_teacher": 0.5, "top1_agreement": 0.75}
    write_json(
        tiny_cache.paths.evaluate / "metrics.json",
        {"t2": judged | {"model_sha256": t2}, "student": judged | {"model_sha256": "of before"}},
    )
    runs = folder_runs(tiny_cache.paths)
    assert [run.name for run in runs] == ["baseline", "student", "t2"]
    assert varied_keys(runs) == ["train.targets", "train.temperature"]  # alpha does nothing there
    rows = {row["run"]: row for row in sweep_rows(runs)}
    assert rows["t2"]["train.temperature"] == "2"
    assert (rows["t2"]["KL to teacher"], rows["t2"]["top-1 agreement"]) == ("0.5000", "0.7500")
    assert rows["student"]["KL to teacher"] == ""
    assert rows["baseline"]["train.temperature"] == rows["baseline"]["KL to cache"] == ""
    last = json.loads((tiny_cache.paths.runs / "t2/dvclive/metrics.json").read_text())["validation"]
    assert rows["t2"]["validation loss"] == f"{last['loss']:.4f}"
    assert rows["t2"]["KL to cache"] == f"{last['kl']:.4f}"


def test_rows_come_by_loss_with_what_differs() -> None:
    runs = [
        made_up("slow", 3.5, train_learning_rate=1e-4, student_layers=[0, 2]),
        made_up("fast", 3.25, train_learning_rate=0.001, student_layers=[0, 1, 2]),
    ]
    rows = sweep_rows(runs)
    assert sweep_markdown(rows).splitlines() == [
        "| run | train.learning_rate | student.layers | validation loss | KL to cache | "
        "KL to teacher | top-1 agreement |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| fast | 0.001 | 3: 0, 1, 2 | 3.2500 | 0.2500 |  |  |",
        "| slow | 0.0001 | 2: 0, 2 | 3.5000 | 0.2500 |  |  |",
    ]
    assert varied_keys(runs[:1]) == []


def experiment(
    name: str, values: dict[str, Any], state: str | None, loss: float, judged: str = "new"
) -> dict[str, Any]:
    """As `dvc exp show --json` prints one."""
    data = {
        "params": {"params.yaml": {"data": values}},
        "metrics": {
            "cache/runs/student/dvclive/metrics.json": {
                "data": {"validation": {"loss": loss, "kl": 0.1}, "model_sha256": "new"}
            },
            "cache/evaluate/metrics.json": {
                "data": {
                    "student": {
                        "kl_to_teacher": 0.4,
                        "top1_agreement": 0.5,
                        "model_sha256": judged,
                    }
                }
            },
        },
    }
    executor = None if state is None else {"state": state}
    return {"name": name, "revs": [{"data": data}], "executor": executor}


def test_experiments_of_dvc(tiny_params: Params, tmp_path: Path) -> None:
    values = yaml.safe_load((tmp_path / "params.yaml").read_text())
    hot = copy.deepcopy(values)
    hot["train"]["temperature"] = 2
    hot["run"]["checkpoint_every"] = 7
    hot["student"]["lora"] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj"]}
    broken = {"name": "broken", "revs": [{"data": None}], "executor": None}
    shown = [
        {"rev": "workspace", "experiments": None},
        {
            "rev": "abc",
            "experiments": [
                experiment("first", values, "success", 4.0),
                experiment("hot", hot, None, 3.0),
                experiment("trained alone", values, None, 2.0, judged="old"),
                experiment("waits", values, "queued", 4.0),
                experiment("failed", values, "failed", 4.0),
                broken,
            ],
        },
    ]
    paths = tiny_params.paths.model_copy(
        update={"runs": Path("cache/runs"), "evaluate": Path("cache/evaluate")}
    )
    runs = experiments_of(shown, paths)
    assert [(run.name, run.loss, run.kl_to_teacher) for run in runs] == [
        ("first", 4.0, 0.4),
        ("hot", 3.0, 0.4),
        ("trained alone", 2.0, None),
    ]
    assert varied_keys(runs) == ["student.lora", "train.temperature"]
    assert sweep_rows(runs)[1]["student.lora"] == "given"
    assert values["student"]["vocab_size"] == values["student"]["head_dim"] == "auto"
    by_hand = made_up("by hand", 5.0, student_vocab_size=320, student_head_dim=64)
    assert varied_keys([*runs, by_hand]) == ["student.lora", "train.temperature"]


def test_outside_of_a_project_dvc_says_why(
    tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DecantError, match=r"`dvc exp show` failed \(.*not inside of a DVC"):
        dvc_experiments(tiny_params.paths)


def words_of(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>(.*?)</text>", svg)


def test_pictures() -> None:
    runs = [
        made_up("a", 3.0, train_k=4, train_learning_rate=1e-4, student_layers=[0, 2]),
        made_up("b", 2.5, train_k=None, train_learning_rate=1e-3, student_layers=[0, 2]),
        made_up("c", 2.0, train_k=4, train_learning_rate=1e-2, student_layers=[0, 1, 2]),
    ]
    figures = sweep_figures(runs)
    assert list(figures) == ["train.k", "train.learning_rate", "student.layers"]
    words = {key: words_of(svg) for key, svg in figures.items()}
    assert {"4", "null"} <= set(words["train.k"])
    assert {"a", "b", "c"} <= set(words["train.learning_rate"])
    assert "student.layers" in words["student.layers"]
    assert sweep_figures(runs[:1]) == {}
    many = [made_up(f"run{i}", 3.0 - 0.01 * i, train_alpha=i / 20) for i in range(20)]
    assert "run3" not in words_of(sweep_figures(many)["train.alpha"])


def test_scatter_by_distance_from_the_teacher() -> None:
    runs = [made_up("a", 3.0), made_up("b", 2.5)]
    assert {"a", "b", "KL to cache, nats"} <= set(words_of(sweep_scatter(runs)))
    judged = [replace(run, kl_to_teacher=0.5) for run in runs]
    assert "KL to teacher, nats" in words_of(sweep_scatter(judged))
    alone = replace(runs[1], kl_to_cache=None)
    assert sweep_scatter([runs[0], alone]) == ""  # nothing to compare


def test_the_optuna_study_runs_and_continues(tiny_cache: Params, tmp_path: Path) -> None:
    """docs/sweep_optuna.py as it stands; the validation loss it reports is its best run's."""
    study = runpy.run_path(str(ROOT / "docs" / "sweep_optuna.py"))["main"]
    words = ["--params", str(tmp_path / "params.yaml"), "--trials", "1"]
    for count in (1, 2):
        last = CliRunner().invoke(study, words, catch_exceptions=False).stdout.splitlines()[-1]
        assert f"is the best of {count}: " in last
    runs = folder_runs(tiny_cache.paths)
    assert [run.name for run in runs] == ["trial0", "trial1"]
    best = min(runs, key=lambda run: run.loss)
    assert last.startswith(f"{best.name} is the best of 2: {best.loss:.4f}")
    assert {"train.alpha", "train.learning_rate"} <= set(varied_keys(runs))

    (tiny_cache.paths.runs / "optuna.db").unlink()
    done = CliRunner().invoke(study, words)
    assert done.exit_code == 1
    assert "trial0" in done.stderr
    assert "Traceback" not in done.output
