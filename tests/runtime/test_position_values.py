from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.runtime.position_values import PositionValues
from tests.helpers import RunPython


def test_values_of_all_chunks_in_order() -> None:
    values = PositionValues(10, "cpu")
    assert values.by_name() == {}
    values.add({"loss": torch.tensor([0.5, 1.5]), "right": torch.tensor([True, False])})
    values.add({"right": torch.tensor([True]), "loss": torch.tensor([2.5])})
    values.add({"loss": torch.empty(0), "right": torch.empty(0)})
    found = values.by_name()
    assert {name: value.tolist() for name, value in found.items()} == {
        "loss": [0.5, 1.5, 2.5],
        "right": [1.0, 0.0, 1.0],
    }


GROWTH = """
import torch
from pipeline.runtime.position_values import PositionValues

head = torch.zeros(8, 8192)
models = [PositionValues(64 * 60, "cpu") for _ in range(3)]
for chunk in range(60):
    teacher = (torch.zeros(64, 8) @ head).log_softmax(-1)
    for values in models:
        log_q = (torch.zeros(64, 8) @ head).log_softmax(-1)
        kl = (teacher.exp() * (teacher - log_q)).sum(-1)
        values.add({"loss": -log_q[:, 0], "kl": kl, "right": log_q.max(-1).indices == 0})
    if chunk in (9, 59):
        print(int(open("/proc/self/statm").read().split()[1]) * 4096)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_chunks(run_python: RunPython, tmp_path: Path) -> None:
    """The chunks' logits are 2 MB each; up to 15 MB per chunk stayed allocated."""
    (tmp_path / "growth.py").write_text(GROWTH)
    done = run_python(str(tmp_path / "growth.py"))
    early, late = map(int, done.stdout.split())
    assert late - early < 100e6
