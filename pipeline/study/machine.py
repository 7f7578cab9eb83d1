"""The machine and the files that a study was made with, so that it can be repeated."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import torch

from pipeline.io.object_store import MARK
from pipeline.runtime.console import readable_bytes
from pipeline.study.section import Table


def describe_device(device: torch.device) -> str:
    """Return name and memory of the GPU, or of the processor with its number of threads."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return f"{about.name}, {readable_bytes(about.total_memory)} of memory"
    memory = _memory()
    kept = f", {readable_bytes(memory)} of memory" if memory else ""
    return f"{_processor()}, {torch.get_num_threads()} threads{kept}"


def _processor() -> str:
    """Return the processor's name from Linux, or on other systems what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int | None:
    """Return the machine's memory in bytes; None if the system does not provide it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def file_table(folder: Path) -> Table:
    """List the files of a model folder with their size and sha256, as `sha256sum` prints it."""
    rows = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != MARK:
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            rows.append((file.name, f"{file.stat().st_size:,}", found))
    return Table("Files of the folder", ("file", "bytes", "sha256"), rows)
