"""The recipe for on-policy distillation: two rounds by DVC, with tiny models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.generation.rollouts import CORPUS, JOURNAL
from pipeline.model.folder import hash_weights
from tests.helpers import ROOT, tiny_values
from tests.models import make_teacher

ROUNDS = ("round1", "round2")


def run(folder: Path, *words: str) -> str:
    """A command in the project, whose `python` is warm."""
    path = f"{folder.parent / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        words, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_rounds(
    teacher_folder: Path, text_folder: Path, warm_python: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    (tmp_path / "bin").symlink_to(warm_python.parent)
    for name in ("pipeline", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc")
    for name in (".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    recipe = Path("docs/recipes/on-policy")
    for place in (recipe, Path("on-policy")):
        (folder / place).mkdir(parents=True)
        shutil.copy(ROOT / recipe / "dvc.yaml", folder / place)
    values = tiny_values(teacher_folder, text_folder, Path("cache"))
    values["rollouts"] |= {
        "source": "files",
        "files": values["corpus"]["files"],
        "num_prompts": 40,
        "prompt_tokens": 8,
        "max_new_tokens": 16,
        "row_length": 32,
        "dtype": "float32",
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(teacher_folder, folder / "cache" / "teacher")
    first = folder / "cache" / "runs" / "student" / "model"
    make_teacher(first, seed=3, num_hidden_layers=2, hidden_size=32)
    run(folder, "git", "init", "-q")
    who = ("-c", "user.name=t", "-c", "user.email=t@example.com")
    run(folder, "git", *who, "commit", "-q", "--allow-empty", "-m", "DVCLive wants a commit")
    dvc = (sys.executable, "-m", "dvc")
    said = run(folder, *dvc, "repro", "on-policy/dvc.yaml")
    stages = [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]
    order = [
        f"on-policy/dvc.yaml:{stage}@{n}"
        for n in ROUNDS
        for stage in ("rollouts", "prepare", "train")
    ]
    assert stages == order
    writer = first
    for number, name in enumerate(ROUNDS, 1):
        work = folder / "cache" / "on-policy" / name
        model = work / "student" / "model"
        with (work / "rollouts" / JOURNAL).open() as journal:
            made_by = json.loads(journal.readline())["fingerprint"]
        assert (made_by["model"], made_by["seed"]) == (hash_weights(writer), number)
        corpus = CorpusSplit(work / "rollouts" / CORPUS, "train")
        about = json.loads((work / "student" / "run.json").read_text())
        assert about["corpus_sha256"] == corpus.info.sha256
        assert about["start_sha256"] == hash_weights(writer) != hash_weights(model)
        assert (about["train"]["divergence"], about["train"]["alpha"]) == ("reverse_kl", 1.0)
        writer = model
    assert "up to date" in run(folder, *dvc, "status")  # silent about the recipe in docs/
