"""The study as a Markdown report for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from pipeline.io.files import write_bytes, write_json, write_text
from pipeline.runtime.console import readable_bytes
from pipeline.study.comparison import Part, shown


def write_study(folder: Path, about: str, device: str, parts: Sequence[Part]) -> Path:
    """Write study.md, study.json and the files of the parts; return the path of study.md.

    Args:
        about: one line about the model.
        device: one line about the device that it ran on.
    """
    total = sum(len(part.comparisons) for part in parts)
    passed = total - sum(len(part.failed) for part in parts)
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    packages["Python"] = platform.python_version()
    head = [
        "# What the model is made of",
        f"{about}, on {device}. {passed} of {total} comparisons pass.",
        "Ours against Hugging Face's, in float32. The limit for a vector is 1e-5, or 1e-5 times "
        "its largest value if that exceeds 1; the vector shown is the one nearest to its limit.",
    ]
    blocks = [block for part in parts for block in _blocks(part)]
    foot = ", ".join(f"{name} {number}" for name, number in packages.items())
    report = folder / "study.md"
    write_text(report, "\n\n".join([*head, *blocks, foot]) + "\n")
    found = {
        "model": about,
        "device": device,
        "packages": packages,
        "passed": passed,
        "total": total,
        "parts": [_values(part) for part in parts],
    }
    write_json(folder / "study.json", found)
    for part in parts:
        for name, content in part.files.items():
            write_bytes(folder / name, content)
    return report


def _values(part: Part) -> dict[str, object]:
    values = asdict(part)
    del values["files"]
    for comparison, written in zip(part.comparisons, values["comparisons"], strict=True):
        written["passed"] = comparison.passed
    return values


def _blocks(part: Part) -> Iterator[str]:
    """Yield a part's headings, paragraphs, tables and texts in Markdown."""
    yield f"## {part.title}"
    yield from map(_cell, part.notes)
    if part.comparisons:
        yield _table(
            [
                ("comparison", "shape", "largest difference", "limit", ""),
                *(
                    (
                        c.name,
                        " x ".join(map(str, c.shape)),
                        shown(c.measured),
                        shown(c.limit),
                        "pass" if c.passed else "FAIL",
                    )
                    for c in part.comparisons
                ),
            ]
        )
    for title, text in part.texts.items():
        yield f"### {title}"
        yield _fenced(text)
    for title, table in part.tables.items():
        yield f"### {title}"
        yield _table(table)


def _table(table: Sequence[Sequence[object]]) -> str:
    head, *rows = ([_cell(value) for value in row] for row in table)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _cell(value: object) -> str:
    """Escape anything that would end a cell or be taken for markup."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", str(value)).replace("\n", " ")


def _fenced(text: str) -> str:
    """Return a code block, fenced by more backticks than the text contains."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip(chr(10))}\n{fence}"


def describe_device(device: torch.device) -> str:
    """Return name and memory of the GPU, or of the processor with its number of threads."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return f"{about.name}, {readable_bytes(about.total_memory)} of memory"
    found = re.search(r"^model name\s*: (.+)", _cpuinfo(), re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return f"{name}, {torch.get_num_threads()} threads"
    return f"{name}, {torch.get_num_threads()} threads, {readable_bytes(memory)} of memory"


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""
