"""Checkpoints: everything a run needs to continue exactly, written atomically.

`<run>/checkpoints/step_<n>/` holds the student (safetensors), the optimizer's state and the random
state (torch, read back with weights_only=True), and state.json (step, skipped steps, history). The
place in the data needs no storing: it follows from the step. A folder appears under its name only
when complete; the newest two are kept.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.files import atomic_folder

_KEEP = 2


@dataclass
class TrainState:
    """What changes while training, apart from tensors."""

    step: int = 0  # optimizer steps done
    skipped: int = 0  # of those, dropped for a non-finite loss or gradient
    history: list[dict[str, float]] = field(default_factory=list)  # what was logged, with "step"


def save_checkpoint(
    run: Path, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
) -> None:
    """Write the checkpoint of `state.step` and drop all but the newest two."""
    root = run / "checkpoints"
    with atomic_folder(root / f"step_{state.step:08d}") as folder:
        tensors = {name: p.detach().contiguous() for name, p in student.named_parameters()}
        save_file(tensors, folder / "student.safetensors")
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        torch.save({"optimizer": optimizer.state_dict(), "random": random}, folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps(asdict(state)))
    for old in list_checkpoints(run)[:-_KEEP]:
        shutil.rmtree(old)


def load_checkpoint(
    folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer
) -> TrainState:
    """Restore student, optimizer and random state in place; returns the rest."""
    device = next(student.parameters()).device
    tensors = load_file(folder / "student.safetensors")
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(tensors[name])
    saved: dict[str, Any] = torch.load(
        folder / "optimizer.pt", map_location=device, weights_only=True
    )
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"]["cpu"].cpu())
    if "cuda" in saved["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["random"]["cuda"].cpu())
    return TrainState(**json.loads((folder / "state.json").read_text()))


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted(folder for folder in folders if folder.suffix != ".partial")
