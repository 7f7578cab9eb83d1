"""Whether Triton kernels run: compiled for five kinds of GPU without one, or replaced in time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.losses import chunked, kernels_torch
from pipeline.runtime import triton_usable
from pipeline.targets import reduce, reduce_torch
from tests.triton_checks import ARCHITECTURES, needs_triton, run_apart


def compiled(tmp_path: Path, architectures: tuple[int, ...], *, large: bool) -> set[str]:
    code = f"sys.stdout.writelines(compile_all(*{architectures}, large={large}))"
    printed = run_apart("tests.triton_checks", code, TRITON_CACHE_DIR=str(tmp_path))
    sys.stdout.write(printed)  # pytest -s shows it
    return set(re.findall(r"^sm_(\d+) \w+: ", printed, re.MULTILINE))


@needs_triton
def test_kernels_compile_for_an_h100_without_spills(tmp_path: Path) -> None:
    assert compiled(tmp_path, (90,), large=False) == {"90"}


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_every_kind_of_gpu_without_spills(tmp_path: Path) -> None:
    found = compiled(tmp_path, tuple(ARCHITECTURES), large=True)
    assert found == {str(number) for number in ARCHITECTURES}


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("compiler", "this machine lacks a C compiler (on Debian and Ubuntu: apt install gcc)"),
        ("headers", "lacks Python.h (on Debian and Ubuntu: apt install python3-dev)"),
        ("nothing", "RuntimeError: no kernel image"),
        ("triton", "the package triton is not installed"),
    ],
)
def test_without_a_compiler_the_plain_passes_take_over(
    missing: str,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """As on a GPU whose machine cannot build Triton's launcher: one warning, PyTorch's passes."""

    def launch(device: torch.device) -> None:
        if missing == "compiler":
            raise RuntimeError(
                "Failed to find C compiler. Please specify via CC environment variable"
            )
        if missing == "headers":
            raise subprocess.CalledProcessError(1, ["gcc", "main.c"])
        if missing == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
        raise RuntimeError("no kernel image\nis available")

    def find(name: str, absent: str) -> str | None:
        return None if missing == absent else name

    (tmp_path / "Python.h").touch()
    include = str(tmp_path / "absent" if missing == "headers" else tmp_path)
    monkeypatch.setattr(triton_usable, "_launch", launch)
    monkeypatch.setattr(triton_usable.shutil, "which", lambda name: find(name, "compiler"))
    monkeypatch.setattr(triton_usable.sysconfig, "get_paths", lambda: {"include": include})
    monkeypatch.setattr(
        triton_usable.importlib.util, "find_spec", lambda name: find(name, "triton")
    )
    triton_usable._runs_on.cache_clear()
    device = torch.device("cuda", 0)
    try:
        assert chunked.kernels_for(device) is kernels_torch
        assert reduce.reduction_for(device) is reduce_torch
    finally:
        triton_usable._runs_on.cache_clear()
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: Triton kernels do not run on cuda:0, ")
    assert named in line


@pytest.mark.gpu
def test_a_gpu_runs_the_probe() -> None:
    triton_usable._runs_on.cache_clear()
    assert triton_usable.triton_usable(torch.device("cuda"))
