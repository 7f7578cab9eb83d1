"""The folder's files, and each tensor of the checkpoint: key, shape, dtype, bytes and owner.

Our names are Hugging Face's (pipeline/model/decoder.py), so nothing is renamed on loading; the
table shows this line by line, and the comparison is bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.runtime.device import dtype_name
from pipeline.study.machine import file_table
from pipeline.study.section import Comparison, Section, Table
from pipeline.study.subject import Subject


def tensors(subject: Subject) -> Section:
    """List the weights, and compare them with ours."""
    stored = dict(_read(subject.folder))
    theirs = subject.theirs
    ours: nn.Module = nn.Module() if subject.unsupported else subject.ours
    our_names = {name for name, _ in ours.named_parameters(remove_duplicate=False)}
    rows = [
        (
            name,
            " x ".join(map(str, tensor.shape)),
            dtype_name(tensor.dtype),
            _owner(theirs, name),
            f"{tensor.nbytes:,}",
            f"the same, in {_owner(ours, name)}" if name in our_names else "none",
        )
        for name, tensor in stored.items()
    ]
    total = sum(tensor.nbytes for tensor in stored.values())
    section = Section(
        "tensors",
        "Weights",
        prose=[
            f"{len(stored)} tensors, {total:,} bytes ({total / 1e6:,.1f} MB) in the folder's "
            "safetensors. Names are Hugging Face's on both sides."
        ],
        tables=[
            file_table(subject.folder),
            Table(
                "Every tensor",
                ("key", "shape", "dtype", "module", "bytes", "our name for it"),
                rows,
                folded=True,
            ),
        ],
    )
    if our_names:
        section.comparisons += _against(ours, theirs, stored)
    return section


def _against(ours: nn.Module, theirs: nn.Module, stored: dict[str, Tensor]) -> list[Comparison]:
    """Compare names and values: as stored, and as Hugging Face loaded them."""
    loaded = dict(theirs.named_parameters())
    mine = dict(ours.named_parameters())
    apart = float(len(loaded.keys() ^ mine.keys()))
    both = sorted(loaded.keys() & mine.keys())
    return [
        Comparison("names of parameters that only one has", apart, 0),
        Comparison("values, as loaded", _worst([_apart(mine[n], loaded[n]) for n in both]), 0),
        Comparison(
            "values, as stored",
            _worst([_apart(mine[name], stored[name]) for name in both if name in stored]),
            0,
        ),
    ]


def _worst(differences: list[float]) -> float:
    """Return the largest difference; NaN if any is NaN, which Python's max could miss."""
    return float(torch.tensor(differences, dtype=torch.float64).max())


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a.cpu() - b.cpu().to(torch.float32)).abs().max())


def _read(folder: Path) -> list[tuple[str, Tensor]]:
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found += [(name, opened.get_tensor(name)) for name in opened.keys()]  # noqa: SIM118
    return sorted(found, key=lambda entry: _natural(entry[0]))


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _owner(model: nn.Module, name: str) -> str:
    """Return the class of the module that holds a parameter."""
    try:
        return type(model.get_submodule(name.rpartition(".")[0])).__name__
    except AttributeError:
        return "none"
