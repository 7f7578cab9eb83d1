"""The stages as a user runs them: by hand, by `dvc repro`, in a queue of experiments."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from pipeline.config.params import Params
from tests.helpers import ROOT, RunPython, tiny_values
from tests.models import make_sentences
from tests.waiting import PATIENCE

STAGES = (
    "inputs",
    "fetch",
    "corpus",
    "advise",
    "prepare",
    "verify",
    "train",
    "evaluate",
    "humaneval",
    "rollouts",
    "export",
    "report",
    "study",
    "convert",
)


DVC_STAGES = tuple(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])


def run_cold(*words: str) -> subprocess.CompletedProcess[str]:
    """A process that imports everything itself, unlike those of the fixture `run_python`."""
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def fails(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one sentence of a stage that failed."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains(stage: str) -> None:
    done = run_cold(f"stages/{stage}.py", "--help")
    assert done.returncode == 0
    for word in ("--params", "--set KEY=VALUE", "writes paths.", "Reads "):
        assert word in " ".join(done.stdout.split()), word


HEAVY = {"torch", "numpy", "transformers", "datasets", "zarr", "hydra", "dvclive"}
"""Packages that take from a tenth of a second to several to import."""


def heavy_imports(done: subprocess.CompletedProcess[str]) -> set[str]:
    """What `python -X importtime` says was imported, of those."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 20
    return HEAVY & {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("stage", sorted(file.stem for file in (ROOT / "stages").glob("*.py")))
def test_help_waits_for_no_heavy_package(stage: str) -> None:
    done = run_cold("-X", "importtime", "-m", f"stages.{stage}", "--help")
    assert done.returncode == 0, done.stderr
    assert not heavy_imports(done)


def test_a_mistake_waits_for_no_heavy_package() -> None:
    mistake = ("--params", "params.yaml", "--set", "seed=-1")
    done = run_cold("-X", "importtime", "-m", "stages.train", *mistake)
    assert done.returncode == 2, done.stderr
    assert heavy_imports(done) <= {"hydra"}  # which parses --set


def test_no_stage_takes_the_name_of_a_standard_module() -> None:
    """`python stages/x.py` puts stages/ first on the path: such a name would shadow the module."""
    assert not {file.stem for file in (ROOT / "stages").glob("*.py")} & sys.stdlib_module_names


def test_errors_are_one_sentence_with_a_status(
    tiny_corpus: Params, tmp_path: Path, run_python: RunPython
) -> None:
    run = run_python
    params = ["--params", str(tmp_path / "params.yaml")]
    assert "does not exist: run stages/prepare.py" in fails(run("stages/train.py", *params), 1)
    assert "does not exist" in fails(run("stages/verify.py", *params), 1)
    sentence = fails(run("stages/train.py", *params, "--set", "train.temprature=2"), 2)
    assert "did you mean train.temperature?" in sentence
    sentence = fails(run("stages/prepare.py", *params, "--set", "prepare.k=301"), 2)
    assert "prepare.k=301 exceeds the 300 ids" in sentence
    sentence = fails(run("stages/evaluate.py", *params), 1)
    assert "run stages/train.py --run student first" in sentence
    assert "cannot be read" in fails(run("stages/report.py", *params), 1)
    sentence = fails(run("stages/prepare.py", *params, "--repair", "--shards", "1/2"), 2)
    assert "repair with one process" in sentence
    (tmp_path / "a_file").write_text("")
    set_path = ["--set", f"paths.logits={tmp_path / 'a_file' / 'logits.zarr'}"]
    sentence = fails(run("stages/prepare.py", *params, *set_path), 1)
    assert "a_file" in sentence
    assert "a file lies where a folder should" in sentence
    sentence = fails(run("stages/corpus.py", "--params", "absent.yaml"), 2)
    assert "absent.yaml cannot be read" in sentence


def test_gate_failure_is_status_1_and_says_which_threshold(
    tiny_cache: Params, tmp_path: Path, run_python: RunPython
) -> None:
    params = ["--params", str(tmp_path / "params.yaml"), "--set", "verify.min_mean_cosine=1.0"]
    done = run_python("stages/verify.py", *params)
    assert done.returncode == 1
    assert "gate FAILED: mean cosine 0.99" in done.stdout
    assert not json.loads((tiny_cache.paths.verify / "metrics.json").read_text())["passed"]


def test_damage_is_named_and_repaired_by_hand(
    tiny_cache: Params, tmp_path: Path, run_python: RunPython
) -> None:
    run = run_python
    params = ["--params", str(tmp_path / "params.yaml")]
    file = tiny_cache.paths.logits / "train" / "lse" / "c" / "3" / "0"
    file.write_bytes(file.read_bytes()[:-7])
    done = run("stages/verify.py", *params, "--structure")
    assert done.returncode == 1
    assert "train shard 3: lse/c/3/0 has" in done.stdout
    assert "NOT intact; run stages/prepare.py --repair" in done.stdout
    done = run("stages/prepare.py", *params, "--repair")
    assert done.returncode == 0
    assert "train shard 3: lse/c/3/0 has" in done.stdout
    assert "1 of 8 shards new" in done.stdout
    done = run("stages/verify.py", *params, "--structure")
    assert done.returncode == 0
    assert "8 committed shards read, all whole" in done.stdout
    sentence = fails(run("stages/prepare.py", *params, "--shards", "3/2"), 2)
    assert "--shards 3/2 is not I/N" in sentence
    sentence = fails(run("stages/prepare.py", *params, "--shards", "1/2", "--overwrite"), 2)
    assert "would delete what the other processes wrote" in sentence


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory,
    teacher_folder: Path,
    text_folder: Path,
    warm_python: Path,
) -> Path:
    """A clone of the project with tiny parameters, after one `dvc repro`."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    folder.mkdir()
    (folder.parent / "bin").symlink_to(warm_python.parent)
    for name in ("pipeline", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, folder / ".dvc" / name)
    values = tiny_values(teacher_folder, text_folder, Path("cache"))
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    git(folder, "init", "-q", "-b", "main")
    commit(folder, "the project")
    log_of(folder).write_text(dvc(folder, "repro"))
    commit(folder, "first run")
    return folder


def log_of(project: Path) -> Path:
    """What the first `dvc repro` printed."""
    return project.with_suffix(".log")


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)


def dvc(folder: Path, *words: str, code: int = 0) -> str:
    """Run DVC on the project with the copy's own stages and library, whose `python` is warm."""
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
        "PATH": f"{folder.parent / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@example.com",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@example.com",
    }
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def stages_run(output: str) -> list[str]:
    """The stages that a `dvc repro` ran, but for `inputs`, which it runs each time."""
    lines = [line for line in output.splitlines() if line.startswith("Running stage")]
    return [line.split("'")[1] for line in lines if "'inputs'" not in line]


def test_repro_runs_everything_once(project: Path) -> None:
    assert stages_run(dvc(project, "repro")) == []
    metrics = json.loads(dvc(project, "metrics", "show", "--json"))
    files = metrics[""]["data"]
    assert files["cache/verify/metrics.json"]["data"]["passed"] is True
    assert files["cache/evaluate/metrics.json"]["data"]["student"]["tokens"] > 300
    assert files["cache/export/check.json"]["data"]["passed"] is True
    assert (project / "cache/export/student/model.safetensors").exists()
    page = (project / "cache/report/index.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:""", page)  # nothing to load
    assert "the cat" in page


def test_each_stage_says_first_what_it_will_do(project: Path) -> None:
    """Those that run a model say how long it takes, too: measured here, not looked up."""
    blocks = log_of(project).read_text().split("Running stage ")[1:]
    first = {
        block.split("'")[1]: block.split("> python -m ")[1].splitlines()[1] for block in blocks
    }
    assert set(first) == set(DVC_STAGES)
    for stage, line in first.items():
        name = "train" if stage == "baseline" else stage
        assert line.startswith(f"{name}: "), line
        measured = re.search(r", about [\d.]+ (s|min) on this machine$", line)
        assert bool(measured) is (name in ("prepare", "verify", "train", "evaluate")), line


def test_how_stages_are_run_reruns_nothing(project: Path) -> None:
    """Sections that no result depends on: memory, time, messages."""
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["run"] |= {"checkpoint_every": 3, "activation_checkpointing": True}
    values["capture"]["batch_rows"] = 2
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    assert stages_run(dvc(project, "repro")) == []
    git(project, "checkout", "-q", "--", ".")


def test_params_yaml_that_leaves_out_a_key_is_refused_until_completed(
    project: Path, run_python: RunPython
) -> None:
    """DVC would take the absent key for unchanged, whatever its default becomes."""
    file = project / "params.yaml"
    values = yaml.safe_load(file.read_text())
    del values["train"]["weight_decay"]  # whose value is the default
    file.write_text(yaml.safe_dump(values))
    assert "leaves out train.weight_decay, whose" in dvc(project, "repro", code=255)
    words = ("--params", str(file), "--output", str(file))
    assert run_python("stages/show_params.py", *words).returncode == 0
    assert stages_run(dvc(project, "repro")) == []
    git(project, "checkout", "-q", "--", ".")


def test_temperature_reruns_train_and_what_follows_only(project: Path) -> None:
    before = teacher_files(project)
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("temperature: 1.0", "temperature: 2.0"))
    assert stages_run(dvc(project, "repro")) == ["train", "evaluate", "export", "report"]
    difference = json.loads(dvc(project, "metrics", "diff", "--json"))
    changed = difference["cache/evaluate/metrics.json"]["student.loss"]
    assert changed["old"] != changed["new"]
    assert teacher_files(project) == before
    shown = dvc(project, "plots", "show", "-o", "plots")
    assert Path(shown.strip().removeprefix("file://")).exists()
    shutil.rmtree(project / "plots")
    (project / "params.yaml").write_text(text)
    assert stages_run(dvc(project, "repro")) == []  # from DVC's run cache, nothing is computed
    git(project, "checkout", "-q", "--", ".")


def teacher_files(project: Path) -> dict[str, int]:
    """When each file of teacher, corpus and cache was last written."""
    return {
        str(file): file.stat().st_mtime_ns
        for name in ("teacher", "corpus.zarr", "logits.zarr")
        for file in sorted((project / "cache" / name).rglob("*"))
        if file.is_file()
    }


def test_queued_experiments_share_one_cache(project: Path, run_python: RunPython) -> None:
    """A sweep over everything that a student may change, two experiments on one cache."""
    before = teacher_files(project)
    varied = ["train.temperature=2,4", "train.alpha=0.7", "train.learning_rate=0.001"]
    varied += ["train.k=8", "student.layers=[0,1,2]"]
    settings = [word for text in varied for word in ("-S", text)]
    dvc(project, "exp", "run", "--queue", "train", *settings)
    copied = run_queue(project)
    shown = json.loads(dvc(project, "exp", "show", "--json"))
    experiments = [e for baseline in shown for e in (baseline.get("experiments") or [])]
    finished = [experiment["revs"][0] for experiment in experiments]
    values = [rev["data"]["params"]["params.yaml"]["data"] for rev in finished]
    assert sorted(v["train"]["temperature"] for v in values) == [2.0, 4.0]
    for v in values:
        chosen = {key: v["train"][key] for key in ("alpha", "learning_rate", "k")}
        assert chosen == {"alpha": 0.7, "learning_rate": 0.001, "k": 8}
        assert v["student"]["layers"] == [0, 1, 2]
    file = "cache/runs/student/dvclive/metrics.json"
    metrics = [rev["data"]["metrics"][file]["data"] for rev in finished]
    assert len({values["validation"]["loss"] for values in metrics}) == 2
    losses = [f"{values['validation']['loss']:.4f}" for values in metrics]
    assert teacher_files(project) == before
    if "reflink" not in dvc(project, "doctor").partition("Cache types:")[2].partition("\n")[0]:
        assert not copied, "an experiment's copy of the project holds copies of the cache"
    for log in [dvc(project, "queue", "logs", experiment["name"]) for experiment in experiments]:
        assert stages_run(log) == ["train"]
    done = run_python("-m", "stages.report", "--sweep", cwd=project)
    names = [experiment["name"] for experiment in experiments]
    report_shows_the_sweep(project, done, dict(zip(names, losses, strict=True)))


def test_a_corpus_that_grows_costs_its_new_rows(project: Path) -> None:
    """The last test here, since it changes the project: more text, then more tokens of it."""
    file = project / "params.yaml"
    values = yaml.safe_load(file.read_text())
    text = project / "more.jsonl"
    text.write_text(
        "\n".join(json.dumps({"text": f"{t} Anew."}) for t in make_sentences(9, seed=9))
    )
    values["corpus"]["files"]["paths"].append("more.jsonl")
    values["corpus"]["train_tokens"] += 640  # 20 rows: the last old one has padding
    file.write_text(yaml.safe_dump(values))
    said = dvc(project, "repro", "prepare")
    assert stages_run(said) == ["corpus", "prepare"]
    assert "(20 rows and " in said
    assert "train holds the first 94 of 114 rows" in said
    assert "top 16 of 640 tokens in 3 shards" in said  # the last old shard is completed
    assert "prepare: 640 tokens captured" in said
    assert json.loads(dvc(project, "status", "prepare", "--json")) == {}


def report_shows_the_sweep(
    project: Path, done: subprocess.CompletedProcess[str], losses: dict[str, str]
) -> None:
    """With the runs' own losses, and no KL of an evaluation that was of another model."""
    assert done.returncode == 0, done.stderr
    heading = next(line for line in done.stdout.splitlines() if line.startswith("| run |"))
    for key in ("train.temperature", "train.alpha", "train.learning_rate", "student.layers"):
        assert f"| {key} |" in heading
    assert "train.steps" not in heading
    page = (project / "cache" / "report" / "index.html").read_text()
    rows = {line.split(" | ")[0][2:]: line for line in done.stdout.splitlines() if "|" in line}
    for name, loss in losses.items():
        assert f" | {loss} | " in rows[name]
        assert rows[name].endswith(" |  |  |")
    assert not rows["student"].endswith(" |  |  |")
    for name in (*losses, "student", "baseline"):
        assert f"| {name} |" in done.stdout
        assert f'<th scope="row">{name}</th>' in page
    assert "Validation loss by train.temperature" in page


def run_queue(project: Path) -> set[str]:
    """Run what is queued; returns files of the cache that were seen as copies meanwhile."""
    copied: set[str] = set()
    watched = 0
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(dvc, project, "queue", "start")  # returns when its workers end
        while not running.done():
            for place in (project / ".dvc" / "tmp" / "exps").glob("tmp*/cache/*.zarr"):
                with suppress(FileNotFoundError):  # a finished experiment's folder goes away
                    for file in place.rglob("c/0/0"):
                        watched += 1
                        if file.stat().st_nlink == 1 and not file.is_symlink():
                            copied.add(str(file))
            time.sleep(0.5)
        running.result()
    wait_for_queue(project)
    assert watched, "no experiment's folder was seen"
    return copied


def wait_for_queue(project: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        status = dvc(project, "queue", "status")
        if "Queued" not in status.split("Worker")[0] and "Running" not in status.split("Worker")[0]:
            assert "Failed" not in status, status
            return
        time.sleep(1)
    raise AssertionError(status)
