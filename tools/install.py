"""Install Decant with one of its extras into the environment of the Python that runs this file.

    .venv/bin/python tools/install.py demo          # what `make demo` does; `make test`: dev

uv installs, for a fraction of pip's processor time. It does not read pip's configuration, so its
indexes, constraints, certificates and cache are passed on; where pip has a setting that uv lacks,
or uv cannot be had, pip installs.

PyPI's PyTorch for Linux on x86-64 is the CUDA build. Where no NVIDIA driver is there for it, its
size is told before the download, and how to get the CPU build.
"""

from __future__ import annotations

import argparse
import ast
import csv
import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CPU_INDEX = "ADDRESS, the one that pytorch.org/get-started/locally shows for pip and CPU"
SECONDS_TO_READ = 10
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
_CONSTRAINTS = ("--constraint", "constraints.txt")

# pip's settings and the options or variables that pass them on to uv; others are left to pip.
_OPTIONS = {
    "constraint": "--constraint",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "index-url": "--index-url",
    "no-binary": "--no-binary",
    "only-binary": "--only-binary",
    "trusted-host": "--allow-insecure-host",
}
_VARIABLES = {
    "cache-dir": "UV_CACHE_DIR",
    "cert": "SSL_CERT_FILE",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "no-cache-dir": "UV_NO_CACHE",
    "timeout": "UV_HTTP_TIMEOUT",
}
_WITHOUT_EFFECT = {
    "break-system-packages",
    "config-file",
    "disable-pip-version-check",
    "no-color",
    "no-input",
    "no-python-version-warning",
    "no-warn-script-location",
    "progress-bar",
    "quiet",
    "require-virtualenv",
    "retries",
    "root-user-action",
    "verbose",
}


class NotForUv(Exception):  # noqa: N818 (no error: pip does it)
    """The reason why pip installs instead of uv."""


def pip_settings(listed: str) -> dict[str, str]:
    """Return the settings for `pip install`, from the output of `pip config list`.

    As in pip, a later source overrides an earlier one: [global], [install], PIP_* variables.
    """
    sources: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        source, _, name = key.partition(".")
        if source in sources:
            sources[source][name] = str(ast.literal_eval(value))
    return {name: value for settings in sources.values() for name, value in settings.items()}


def for_uv(settings: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Translate pip's settings to arguments and environment variables of uv.

    Raises:
        NotForUv: uv has no equivalent of a setting; the message names it.
    """
    # With several indexes, pip takes the best version, uv by default the first index that has it.
    arguments, variables = ["--index-strategy", "unsafe-best-match"], {}
    for name, value in settings.items():
        if option := _OPTIONS.get(name):
            arguments += [word for part in value.split() for word in (option, part)]
        elif variable := _VARIABLES.get(name):
            variables[variable] = f"{value}/uv" if name == "cache-dir" else value
        elif name not in _WITHOUT_EFFECT:
            raise NotForUv(f"pip is configured with {name}, which uv does not know")
    return arguments, variables


def find_uv() -> list[str]:
    """Return the command for uv; if there is none, install uv into this environment.

    Raises:
        NotForUv: uv could not be installed.
    """
    own, found = [sys.executable, "-m", "uv"], shutil.which("uv")
    for command in [own, [found]] if found else [own]:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True)
        if version.stdout.startswith("uv "):  # a shim for another Python's uv prints another line
            return command
    if run([*_PIP, "install", *_CONSTRAINTS, "uv"]):
        raise NotForUv("uv could not be installed")
    return own


def has_nvidia_driver() -> bool:
    """Return whether the driver's library can be loaded, as PyTorch's CUDA build does it."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def cuda_notice(planned: str | None) -> str:
    """Return what to say before downloading a CUDA build without a driver for it, else no text.

    Args:
        planned: uv's dry run for torch; None if pip installs, which shows its choice only by
            downloading.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or has_nvidia_driver():
        return ""
    if planned is not None and ("+ torch==" not in planned or "+cpu" in planned):
        return ""
    unless = "" if planned is not None else ", unless pip is configured with another source"
    return (
        "No NVIDIA driver was found, and PyPI's PyTorch is a CUDA build: about 2.7 GB to download, "
        f"5 GB on disk{unless}. It runs on the CPU as well.\n"
        "For the CPU build, 0.2 GB, stop this and add PyTorch's CPU index to the same command: "
        f"TORCH_INDEX={CPU_INDEX}"
    )


def warn_of_size(planned: str | None) -> None:
    """Announce the size of a CUDA build; on a terminal, leave time to read that and stop."""
    if notice := cuda_notice(planned):
        say(notice)
        if sys.stdin.isatty():
            time.sleep(SECONDS_TO_READ)


def forget_incomplete(site_packages: Path) -> list[str]:
    """Remove the metadata of packages with missing files, and return the names of the packages.

    An installer trusts the metadata, and one that was killed may have written little more.
    """
    forgotten = []
    for metadata in sorted(site_packages.glob("*.dist-info")):
        record = metadata / "RECORD"  # from 3.12 on, importlib.metadata omits missing files
        rows = csv.reader(record.read_text().splitlines() if record.exists() else [])
        files = [site_packages / row[0] for row in rows if row and not row[0].endswith(".pyc")]
        if not files or not all(file.exists() for file in files):
            shutil.rmtree(metadata)
            forgotten.append(metadata.name.partition("-")[0])
    return forgotten


def install_by_uv(what: Sequence[str], torch_index: Sequence[str]) -> int:
    """Install by uv, and return its exit status.

    Raises:
        NotForUv: pip should install instead.
    """
    listed = subprocess.run([*_PIP, "config", "list"], capture_output=True, text=True)
    if listed.returncode:
        raise NotForUv("pip's configuration could not be read")
    arguments, variables = for_uv(pip_settings(listed.stdout))
    uv = [*find_uv(), "pip", "install", "--python", sys.executable, *arguments, *torch_index]
    environment = {**variables, **os.environ}
    dry_run = [*uv, *_CONSTRAINTS, "--dry-run", "--no-deps", "torch"]
    planned = subprocess.run(dry_run, cwd=ROOT, env=environment, capture_output=True, text=True)
    warn_of_size(planned.stderr)
    return run([*uv, *what], environment)


def install_by_pip(what: Sequence[str], torch_index: Sequence[str]) -> int:
    """Install by pip, and return its exit status."""
    if not torch_index and not importlib.util.find_spec("torch"):
        warn_of_size(None)
    # A current pip resolves faster than the one that comes with Python. Compiling all modules would
    # take as long as the rest, and Python compiles the modules that it imports anyway.
    run([*_PIP, "install", "--upgrade", "pip"])
    return run([*_PIP, "install", "--no-compile", *torch_index, *what])


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a command in Decant's folder with its output shown; return its exit status."""
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def say(text: str) -> None:
    """Print at once, before the installer's output."""
    print(text, flush=True)


def main() -> int:
    """Parse the arguments and install; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("extra", help="of pyproject.toml: demo, dev, ...")
    parser.add_argument("--installer", choices=("auto", "uv", "pip"), default="auto")
    parser.add_argument("--torch-index", default="", help="of packages beside PyPI's")
    args = parser.parse_args()
    under_way = Path(sys.prefix) / "installing"  # it remains if an installation is killed
    if under_way.exists():
        for name in forget_incomplete(Path(sysconfig.get_path("purelib"))):
            say(f"{name} was left incomplete and is installed again")
    under_way.touch()
    what = [*_CONSTRAINTS, "-e", f".[{args.extra}]"]
    torch_index = ["--extra-index-url", args.torch_index] if args.torch_index else []
    status = None
    if args.installer != "pip":
        try:
            status = install_by_uv(what, torch_index)
        except NotForUv as reason:
            say(f"{reason}: pip installs")
    if status is None or (status and args.installer == "auto"):
        status = install_by_pip(what, torch_index)
    if status == 0:
        under_way.unlink()
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("\nstopped; the same command continues")
        sys.exit(130)
