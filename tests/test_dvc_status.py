"""What `dvc status` calls stale when one parameter or one input changes: this table, nothing else.

The project is the real dvc.yaml over stand-ins: a file or a folder for each of its outs and deps,
committed as if a `dvc repro` had just written them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from dvc.utils.serialize import LOADERS

from pipeline.config.params import Params, Paths, all_keys
from tests.helpers import ROOT

STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
ALWAYS = {"inputs"}
"""The stage that runs each time, to see whether teacher or text has changed."""

PARAMETERS = {  # the longest row that begins a key counts
    "seed": "prepare verify train baseline",
    "device": "",
    "teacher": "inputs fetch export report",
    "corpus": "inputs corpus export report",
    "advise": "",
    "prepare": "prepare",
    "prepare.k": "prepare train",
    "prepare.num_sampled": "prepare train",
    "prepare.top_p": "prepare train",
    "prepare.positions": "prepare train",
    "prepare.entropy_quantile": "prepare train",
    "prepare.dtype": "prepare train evaluate",
    "prepare.engine": "prepare evaluate",
    "prepare.vllm": "prepare evaluate",
    "prepare.dequantize": "prepare train evaluate",
    "prepare.document_mask": "prepare train baseline evaluate",
    "prepare.shard_rows": "prepare train baseline",
    "capture": "",
    "verify": "verify",
    "student": "train baseline report",
    "train": "train baseline report",
    "train.targets": "train report",
    "train.alpha": "train report",
    "train.alpha_end": "train report",
    "train.divergence": "train report",
    "train.temperature": "train report",
    "train.k": "train report",
    "run": "",
    "evaluate": "evaluate",
    "humaneval": "",
    "rollouts": "",
    "export": "export",
    "generate": "",
    "study": "",
}
INPUTS = {
    "cache/inputs/teacher.json": "fetch",
    "cache/inputs/text.json": "corpus",
    "cache/teacher/source.json": "corpus prepare verify train baseline evaluate export",
    "cache/corpus.zarr/file": "prepare verify train baseline evaluate export report",
    "cache/logits.zarr/file": "verify train report",
    "cache/verify/metrics.json": "train report",
    "cache/verify/histogram.json": "report",
    "cache/runs/student/model/file": "evaluate export",
    "cache/runs/baseline/model/file": "evaluate",
    "cache/runs/student/dvclive/plots/metrics/file": "report",
    "cache/evaluate/metrics.json": "export report",
    "cache/evaluate/passage.json": "report",
    "cache/export/check.json": "report",
    "pipeline/losses": "train baseline",
    "pipeline/evaluation/results.py": "evaluate report",
    "pipeline/logit_cache": "prepare verify train baseline report",
    "pipeline/teacher/fetch.py": "fetch",
    "pipeline/data/sources.py": "inputs corpus",
    "stages/export.py": "export",
}
SECTIONS = {key.rpartition(".")[0] for key in all_keys(Params)}
KEYS = sorted({*all_keys(Params)} - SECTIONS - {f"paths.{name}" for name in Paths.model_fields})


def expected(key: str) -> set[str]:
    rows = [row for row in PARAMETERS if f"{key}.".startswith(f"{row}.")]
    return set(PARAMETERS[max(rows, key=len)].split())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repo]:
    """The project's dvc.yaml and params.yaml with stand-ins, all of it up to date."""
    slow = LOADERS[".yaml"]  # 0.1 s for params.yaml, which each stage reads anew
    LOADERS[".yaml"] = lambda path, fs=None: parsed(Path(path).read_text())
    folder = tmp_path_factory.mktemp("status") / "project"
    folder.mkdir()
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    before = Path.cwd()
    os.chdir(folder)
    try:
        repo = Repo.init(".", no_scm=True)
        for stage in repo.index.stages:
            for item in (*stage.deps, *stage.outs):
                place = Path(item.fs_path)
                if place.name != "params.yaml":
                    _put(place, is_file="." in place.name and place.suffix != ".zarr")
        (folder / "cache/teacher/source.json").write_text("{}")
        repo.commit(force=True)
        yield Repo(".")
    finally:
        LOADERS[".yaml"] = slow
        os.chdir(before)


@lru_cache
def parsed(text: str) -> Any:
    return yaml.load(text, yaml.CSafeLoader)


def _put(place: Path, *, is_file: bool) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if is_file:
        place.write_text(f"{{}} {place.name}")
    else:
        place.mkdir(exist_ok=True)
        (place / "file").write_text(place.name)


def stale(repo: Repo) -> set[str]:
    """Stages of which a dep or a parameter has changed, by what `dvc status` asks of each stage."""
    found = set()
    with repo.lock:
        for stage in repo.index.stages:
            for name, reasons in stage.status().items():
                if any(isinstance(reason, dict) and "changed deps" in reason for reason in reasons):
                    found.add(name)
    return found


def changed(text: str, key: str) -> str:
    values = yaml.safe_load(text)
    inner = values
    *sections, last = key.split(".")
    for section in sections:
        if not inner.get(section):  # a section that is off, or in a list of none
            inner[section] = {}
        inner = inner[section]
    inner[last] = "changed"
    return yaml.safe_dump(values)


def test_nothing_is_stale_at_first(project: Repo) -> None:
    assert project.status() == {name: ["always changed"] for name in ALWAYS}
    assert stale(project) == set()


def test_every_row_names_stages_and_keys() -> None:
    rows = {**PARAMETERS, **INPUTS}
    assert {name for row in rows.values() for name in row.split()} == set(STAGES)
    for row in PARAMETERS:
        assert any(f"{key}.".startswith(f"{row}.") for key in KEYS), row


@pytest.mark.parametrize("key", KEYS)
def test_a_parameter_makes_stale(key: str, project: Repo) -> None:
    with changed_file(Path("params.yaml"), lambda text: changed(text, key)):
        assert stale(project) == expected(key)


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_makes_stale(name: str, project: Repo) -> None:
    file = Path(name, "file") if Path(name).is_dir() else Path(name)
    with changed_file(file, lambda text: text + " changed"):
        assert stale(project) == set(INPUTS[name].split())


@contextmanager
def changed_file(file: Path, change: Callable[[str], str]) -> Iterator[None]:
    text = file.read_text()
    file.unlink()  # it may be a link into DVC's cache
    file.write_text(change(text))
    try:
        yield
    finally:
        file.write_text(text)
