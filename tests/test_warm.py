"""A warm process is to a test what a process of `python` is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import RunPython
from tests.waiting import wait_until

SHOWS = """
import os, sys
print(__name__, sys.argv, os.getcwd(), os.environ["MINE"], sys.path[:2], "torch" in sys.modules)
print("pipeline" in sys.modules, file=sys.stderr)
sys.stdin.read() == "typed" or sys.exit("nothing typed")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "folder" / "shows.py"
    file.parent.mkdir()
    file.write_text(SHOWS)
    return file


def test_it_is_given_what_python_is(warm_python: Path, script: Path, tmp_path: Path) -> None:
    environment = os.environ | {"MINE": "1", "PYTHONPATH": "/a"}

    def output(python: str, *words: str, cwd: Path) -> tuple[int, str]:
        done = subprocess.run(
            [python, *words],
            cwd=cwd,
            env=environment,
            input="typed",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == "False\n"
        return done.returncode, done.stdout

    for words, cwd in ((["folder/shows.py", "-x"], tmp_path), (["-m", "shows"], script.parent)):
        status, printed = output(str(warm_python), *words, cwd=cwd)
        assert (status, printed.removesuffix(" True\n")) == (0, printed[:-6])
        assert output(sys.executable, *words, cwd=cwd) == (0, printed[:-5] + "False\n")


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import atexit; atexit.register(print, 'the end')", 0, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_it_ends_as_python_does(
    code: str, status: int, said: str, run_python: RunPython, tmp_path: Path
) -> None:
    (tmp_path / "ends.py").write_text(code)
    done = run_python("ends.py", cwd=tmp_path)
    assert done.returncode == status
    assert done.stderr.endswith(said)
    assert done.stdout == ("the end\n" if "the end" in code else "")


def test_it_dies_with_who_started_it(warm_python: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (tmp_path / "waits.py").write_text(
        f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    )
    process = subprocess.Popen([warm_python, "waits.py"], cwd=tmp_path)
    wait_until(lambda: pid.exists() and pid.read_text())
    process.kill()
    process.wait()
    wait_until(lambda: not Path(f"/proc/{pid.read_text()}").exists())
