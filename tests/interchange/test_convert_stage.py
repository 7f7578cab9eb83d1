"""stages/convert.py as a user runs it: what docs/interchange.md says, and wrong requests."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import SPLITS
from pipeline.io.files import read_json_object
from tests.helpers import ROOT, RunPython, change
from tests.interchange.captures import capture_of, sequences_of
from tests.interchange.distillkit_writer import COMPRESSION

PAGE = (ROOT / "docs" / "interchange.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?:^ {4}\S.*\n(?: {4}.*\n)*)", PAGE, re.MULTILINE)


def fenced(language: str) -> str:
    [block] = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(block.splitlines()) <= 15
    return str(block)


def command(word: str) -> str:
    [found] = [block for block in COMMANDS if word in block]
    return found


@pytest.fixture
def project(tiny_cache: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stages/, params.yaml and the tiny cache in cache/, as on the page."""
    values = tiny_cache.model_dump(mode="json")
    for name, path in values["paths"].items():
        values["paths"][name] = path and path.removeprefix(f"{tmp_path}/")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shell(warm_python: Path, project: Path) -> Any:
    def run(script: str) -> str:
        path = f"{warm_python.parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-e", "-c", script],
            cwd=project,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.returncode, done.stderr
        return done.stdout

    return run


def test_an_import_as_on_the_page(shell: Any, project: Path, teacher_folder: Path) -> None:
    capture_of(project / "captured", sequences_of(teacher_folder))
    config = {"teacher": {"kind": "dataset", "logprob_compressor": COMPRESSION}}
    (project / "captured" / "train.yaml").write_text(yaml.safe_dump(config))
    block = command("--from distillkit").replace("8192", "128")
    out = shell(
        block
        + """
        python stages/verify.py "$@"
        ! python stages/corpus.py "$@" 2>&1
        """
    )
    assert "lost: what DistillKit does not store, lse, entropy and normalisers" in out
    assert "cache/imported/logits.zarr holds the top 16 of each position" in out
    assert "all whole" in out
    assert "gate passed" in out
    assert "cache by distillkit" in out
    assert "was imported from distillkit by stages/convert.py, and holds no text" in out
    assert "cache/runs/imported/model holds" in out
    about = read_json_object(project / "cache" / "runs" / "imported" / "run.json")
    assert about["cache"]["imported_from"] == "distillkit"


def test_the_exports_as_on_the_page(
    shell: Any, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shell(command("--to axolotl"))
    assert "lost: the mass outside the kept ids" in out
    config = yaml.safe_load(fenced("yaml"))
    for key, split in zip(("datasets", "test_datasets"), SPLITS, strict=True):
        [wanted] = config[key]
        assert wanted["split"] == split
        found = datasets.load_dataset(wanted["path"], split=split, cache_dir="hub")
        assert {"input_ids", "attention_mask", "labels", "target_token_ids"} <= set(found.features)
    temperature = f"kd_temperature {config['kd_temperature']:g}:"
    assert temperature in (project / config["datasets"][0]["path"] / "README.md").read_text()
    shell(command("--to datasets"))
    exec(fenced("python").replace('split="train"', 'split="train", cache_dir="hub"'), {})
    assert re.match(r"\d+ \{\d+: -\d", capsys.readouterr().out)


def test_wrong_requests_are_refused_in_a_sentence(
    tiny_cache: Params, tmp_path: Path, run_python: RunPython
) -> None:
    params = ["--params", str(tmp_path / "params.yaml")]

    def refused(*words: str) -> str:
        done = run_python("stages/convert.py", *params, *words)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "convert needs a direction" in refused()
    assert "convert needs a direction" in refused("--from", "distillkit", "--to", "axolotl")
    assert "is not one of 'axolotl', 'datasets'" in refused("--to", "megatron")
    assert "name its folder by --source" in refused("--from", "distillkit")
    assert "name it by --output" in refused("--to", "axolotl")
    assert "--source does not go with --to" in refused("--to", "datasets", "--source", "x")
    assert "--output does not go with --from" in refused("--from", "distillkit", "--output", "x")
    out = str(tmp_path / "out")
    assert "--k 17 exceeds the 16 ids" in refused("--to", "axolotl", "--output", out, "--k", "17")


def test_sampled_ids_alone_are_not_for_axolotl(
    tiny_corpus: Params, tmp_path: Path, run_python: RunPython
) -> None:
    params = change(tiny_corpus, prepare={"k": 0, "num_sampled": 4, "temperatures": [1.0]})
    file = tmp_path / "sampled.yaml"
    file.write_text(yaml.safe_dump(params.model_dump(mode="json")))
    assert not run_python("stages/prepare.py", "--params", str(file)).returncode
    words = ("--to", "axolotl", "--output", str(tmp_path / "out"))
    done = run_python("stages/convert.py", "--params", str(file), *words)
    assert done.returncode == 2
    assert "capture with prepare.k of at least 1" in done.stderr
