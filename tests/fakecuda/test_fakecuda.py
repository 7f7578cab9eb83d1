"""The GPU paths without a GPU: the files gpu_*.py, run by PyTorch's CUDA build on a stand-in.

    make fakecuda

The interpreter that DECANT_TEST_FAKECUDA names has PyTorch's CUDA build and the requirements of the
tests. stand_in.py says what is real there and what is not. On a machine with a GPU,
`python -m pytest tests/fakecuda/gpu_*.py` runs the same checks on it, but for what is counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

HERE = Path(__file__).parent
EVERYTHING = sorted(str(file.relative_to(ROOT)) for file in HERE.glob("gpu_*.py"))
CHECKS = {
    75: [file for file in EVERYTHING if not file.endswith("gpu_ranks.py")],
    80: EVERYTHING,
    90: [f"tests/fakecuda/gpu_{what}.py" for what in ("attention", "capture", "memory")],
}
"""By compute capability, times 10: Turing, Ampere, Hopper, which differs in attention alone."""
pytestmark = pytest.mark.fakecuda


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in, compiled against the headers that come with Triton."""
    folder = tmp_path_factory.mktemp("fakecuda")
    find = (
        "import torch, triton.backends.nvidia as n; assert torch.version.cuda; print(*n.__path__)"
    )
    python = os.environ["DECANT_TEST_FAKECUDA"]
    found = subprocess.run([python, "-c", find], capture_output=True, text=True)
    assert found.returncode == 0, f"{python} has no CUDA build of PyTorch:\n{found.stderr}"
    nvidia = found.stdout.strip()
    for source, library in (("runtime.c", "libfakecuda.so"), ("driver.c", "libcuda.so.1")):
        command = ["gcc", "-std=gnu11", "-O1", "-shared", "-fPIC", f"-I{nvidia}/include"]
        subprocess.run([*command, str(HERE / source), "-o", str(folder / library)], check=True)
    return folder


@pytest.mark.parametrize("capability", CHECKS)
def test_checks_pass_on_stand_in(capability: int, libraries: Path) -> None:
    python = os.environ["DECANT_TEST_FAKECUDA"]
    plugins = ("-p", "tests.fakecuda.stand_in", "-p", "no:cacheprovider")
    variables = {
        "FAKECUDA_CAPABILITY": str(capability),
        "HF_HUB_OFFLINE": "1",
        "LD_LIBRARY_PATH": str(libraries),
        "LD_PRELOAD": str(libraries / "libfakecuda.so"),
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(libraries / "triton"),
        "TRITON_LIBCUDA_PATH": str(libraries),
    }
    done = subprocess.run(
        [python, "-m", "pytest", *plugins, "-q", *CHECKS[capability]],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, f"the checks failed on compute capability {capability / 10}"
