"""Fixtures: a small random teacher with a real tokenizer, text to train on, params to match.

Everything is made on the spot, so no test needs a network or a downloaded model.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
import yaml

from pipeline.config.params import Params, load_params
from pipeline.data.corpus import build_corpus
from tests.helpers import ROOT, RunPython, capture_all, tiny_values
from tests.models import make_sentences, make_teacher

# Small models gain nothing from threads, and on a busy machine threads that wait for each other
# cost ninefold: one here, and in the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
LONG = ("test_stages.py", "test_crash.py", "test_checkpoint.py", "test_distributed.py")


hypothesis.settings.register_profile("decant", deadline=None)  # a busy machine is no defect
hypothesis.settings.load_profile("decant")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files come first, so that no process begins one when the others have finished.
    items.sort(key=lambda item: item.path.name not in LONG)
    conditions = {
        "fakecuda": ("DECANT_TEST_FAKECUDA" in os.environ, "set DECANT_TEST_FAKECUDA"),
        "gpu": (torch.cuda.is_available(), "needs a CUDA GPU"),
        "network": (os.environ.get("DECANT_TEST_NETWORK") == "1", "set DECANT_TEST_NETWORK=1"),
        "vllm": ("DECANT_TEST_VLLM" in os.environ, "set DECANT_TEST_VLLM to an interpreter"),
        "slow": (os.environ.get("DECANT_TEST_SLOW") == "1", "set DECANT_TEST_SLOW=1"),
    }
    for item in items:
        for mark, (met, reason) in conditions.items():
            if item.get_closest_marker(mark) and not met:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forkserver() -> multiprocessing.context.ForkServerContext:
    """Children fork from a process that has imported everything: they start in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.logit_cache.test_crash", "pipeline.training.run", "transformers.models.llama"]
    )
    return context


@pytest.fixture(scope="session")
def warm_python() -> Iterator[Path]:
    """A `python` that has imported the large libraries when it starts (see tests/warm.py)."""
    server = ROOT / "tests" / "warm.py"
    with (
        tempfile.TemporaryDirectory(prefix="warm") as name,  # a socket's path has to be short
        socket.socket(socket.AF_UNIX) as listener,
    ):
        address, command = Path(name) / "socket", Path(name) / "python"
        listener.bind(str(address))
        listener.listen()
        client = f"'{sys.executable}' -I -S '{server}' '{address}'"
        command.write_text(f'#!/bin/sh\nexec {client} "$@"\n')
        command.chmod(0o755)
        process = subprocess.Popen(
            [sys.executable, str(server), str(listener.fileno())],
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            | {"HF_HUB_OFFLINE": "1"},
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,  # which ends when pytest does, however that may be
            start_new_session=True,  # Ctrl-C is for pytest
        )
        listener.close()  # a server that has died is a refused connection
        yield command
        process.communicate()


@pytest.fixture
def run_python(warm_python: Path) -> RunPython:
    """`run_python("stages/x.py", "--words")`: a warm process, by default in the project."""

    def run(*words: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(warm_python), *words],
            cwd=cwd,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def vllm_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment whose vLLM is tests/teacher/fake_vllm.py."""
    folder = tmp_path_factory.mktemp("vllm") / "env"
    venv.create(folder, symlinks=True, with_pip=False)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "torch_and_transformers.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    shutil.copyfile(ROOT / "tests" / "teacher" / "fake_vllm.py", site / "vllm.py")
    about = site / "vllm-1.2.3.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 1.2.3\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents.jsonl."""
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": text}) for text in make_sentences(120, seed=0)]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture
def tiny_params(teacher_folder: Path, text_folder: Path, tmp_path: Path) -> Params:
    """Params of the tiny pipeline under tmp_path, whose teacher folder is already in place."""
    values = tiny_values(teacher_folder, text_folder, tmp_path / "cache")
    values["paths"]["teacher"] = str(teacher_folder)
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_params(file)


@pytest.fixture
def tiny_corpus(tiny_params: Params) -> Params:
    """`tiny_params` with the corpus built."""
    build_corpus(tiny_params.corpus, tiny_params.paths.teacher, tiny_params.paths.corpus)
    return tiny_params


@pytest.fixture
def tiny_cache(tiny_corpus: Params) -> Params:
    """`tiny_params` with corpus and cache built."""
    capture_all(tiny_corpus)
    return tiny_corpus
