"""Checkpoints: everything a run needs to continue exactly, written atomically.

A checkpoint `step_<n>` holds the student (safetensors), the optimizer's state and the random state
(torch, read back with weights_only=True), and state.json (step, skipped steps, history). The place
in the data needs no storing: it follows from the step. On a disk, the folder takes its name only
when complete; in an object store, state.json is written last and its absence means that there is
no checkpoint. The newest two are kept.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.files import atomic_folder
from pipeline.storage import Address, Url, open_folder

_KEEP = 2
_TENSORS = ("student.safetensors", "optimizer.pt")
_STATE = "state.json"


@dataclass
class TrainState:
    """What changes while training, apart from tensors."""

    step: int = 0  # optimizer steps done
    skipped: int = 0  # of those, dropped for a non-finite loss or gradient
    history: list[dict[str, float]] = field(default_factory=list)  # what was logged, with "step"


class Checkpoints:
    """The checkpoints of one run, in a folder or under a prefix of an object store."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._folder = open_folder(address)

    def names(self) -> list[str]:
        """Complete checkpoints, oldest first."""
        return sorted(
            key.partition("/")[0] for key in self._folder.sizes() if key.endswith(f"/{_STATE}")
        )

    def save(self, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Write the checkpoint of `state.step` and drop all but the newest two."""
        name = f"step_{state.step:08d}"
        if isinstance(self.address, Url):
            with tempfile.TemporaryDirectory() as scratch:
                _write(Path(scratch), student, optimizer, state)
                for file in (*_TENSORS, _STATE):  # what says that it exists comes last
                    self._folder.write(f"{name}/{file}", (Path(scratch) / file).read_bytes())
        else:
            with atomic_folder(self.address / name) as partial:
                _write(partial, student, optimizer, state)
        for old in self.names()[:-_KEEP]:
            self._folder.remove(f"{old}/{_STATE}")
            self._folder.remove(old)

    def load_newest(
        self, student: nn.Module, optimizer: torch.optim.Optimizer
    ) -> TrainState | None:
        """Restore student, optimizer and random state in place; None where there is nothing."""
        names = self.names()
        if not names:
            return None
        if not isinstance(self.address, Url):
            return _read(self.address / names[-1], student, optimizer)
        with tempfile.TemporaryDirectory() as scratch:
            for file in (*_TENSORS, _STATE):
                data = self._folder.read(f"{names[-1]}/{file}")
                (Path(scratch) / file).write_bytes(data)
            return _read(Path(scratch), student, optimizer)

    def remove(self) -> None:
        """Delete all of them."""
        self._folder.remove()


def _write(
    folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
) -> None:
    tensors = {name: p.detach().contiguous() for name, p in student.named_parameters()}
    save_file(tensors, folder / "student.safetensors")
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    torch.save({"optimizer": optimizer.state_dict(), "random": random}, folder / "optimizer.pt")
    (folder / _STATE).write_text(json.dumps(asdict(state)))


def _read(folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
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
    return TrainState(**json.loads((folder / _STATE).read_text()))
