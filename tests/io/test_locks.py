"""One process at a time in a folder, and none that is dead in the way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier

import pytest

from pipeline.config.params import Params
from pipeline.errors import DecantError
from pipeline.io.address import Url
from pipeline.io.ownership import atomic_folder, lock
from tests.helpers import ROOT, RunPython

HOLD = """
import sys
from pathlib import Path
from pipeline.io.locks import lock_folder
part, parts = map(int, sys.argv[2:])
with lock_folder(Path(sys.argv[1]), "wait", part=part, parts=parts):
    print("held", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that holds a folder until it is told to end, or killed."""

    def __init__(self, folder: Path, part: int = 1, parts: int = 1) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), str(part), str(parts)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == b"held\n"

    def end(self, how: int | None = None) -> None:
        if how is not None:
            self.process.send_signal(how)
        self.process.communicate()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(tmp_path / "folder")
    yield holder
    holder.end(signal.SIGKILL)


def test_the_second_process_is_told_of_the_first(held: Holder, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(DecantError) as caught, lock(folder, "set paths.x to another place"):
        pass
    who = f"process {held.process.pid} on {socket.gethostname()}"
    assert str(caught.value) == (
        f"{folder} is being written by {who}: wait until it has ended, or set paths.x to another "
        "place"
    )
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(DecantError, match=who), lock(tmp_path / "link", "wait"):
        pass
    with lock(tmp_path / "another", "wait"):
        pass
    held.end()
    with lock(folder, "wait"):
        assert not folder.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]  # no litter


def test_a_killed_process_is_not_in_the_way(held: Holder, tmp_path: Path) -> None:
    held.end(signal.SIGKILL)
    assert (tmp_path / ".folder.lock").exists()
    with lock(tmp_path / "folder", "wait"):
        pass
    assert not list(tmp_path.iterdir())


def test_parts_share_a_folder_and_each_is_one_process(tmp_path: Path) -> None:
    folder, first = tmp_path / "folder", Holder(tmp_path / "folder", 1, 3)
    with ExitStack() as stack:
        stack.enter_context(lock(folder, "wait", part=2, parts=3))
        for part, parts in ((1, 3), (2, 3), (1, 1), (2, 2), (3, 4)):
            with (
                pytest.raises(DecantError, match="is being written by process"),
                lock(folder, "wait", part=part, parts=parts),
            ):
                pass
        with lock(folder, "wait", part=3, parts=3):
            pass
    with pytest.raises(DecantError, match="as a part of 3"), lock(folder, "wait"):
        pass
    first.end()
    with lock(folder, "wait", part=1, parts=2):
        pass
    with lock(folder, "wait"):
        pass
    assert not list(tmp_path.iterdir())


def test_parts_that_start_at_once_all_get_their_share(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ready = Barrier(8)

        def fill(part: int) -> int:
            for _ in range(10):
                ready.wait()
                with lock(tmp_path / "folder", "wait", part=part, parts=8):
                    pass
            return part

        assert list(pool.map(fill, range(1, 9))) == list(range(1, 9))
    assert not list(tmp_path.iterdir())


def test_an_address_in_a_store_is_not_locked() -> None:
    with lock(Url("s3://bucket/x"), "wait"), lock(Url("s3://bucket/x"), "wait"):
        pass


def test_a_folder_under_way_is_left_to_who_makes_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with atomic_folder(folder, "model", key="paths.runs") as partial:
        (partial / "file").write_text("mine")
        with (
            pytest.raises(DecantError, match="is being written by process"),
            atomic_folder(folder, "model", key="paths.runs"),
        ):
            pass
    assert (folder / "file").read_text() == "mine"


@pytest.mark.parametrize("stage", ["corpus", "prepare", "train"])
def test_a_stage_refuses_a_folder_in_use(
    stage: str, tiny_corpus: Params, tmp_path: Path, run_python: RunPython
) -> None:
    paths = tiny_corpus.paths
    folder = {
        "corpus": paths.corpus,
        "prepare": paths.logits,
        "train": paths.runs / "student",
    }[stage]
    with lock(Path(str(folder)), "wait"):
        done = run_python(f"stages/{stage}.py", "--params", str(tmp_path / "params.yaml"))
    assert done.returncode == 1
    assert f"error: {folder} is being written by process {os.getpid()} on " in done.stderr
    assert "Traceback" not in done.stderr
