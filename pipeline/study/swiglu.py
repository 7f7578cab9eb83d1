"""The gated feed-forward step by step: down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.study.section import Picture, Section, Table, compare
from pipeline.study.subject import Subject
from pipeline.study.trace import trace_layer


@torch.no_grad()
def swiglu(subject: Subject) -> Section:
    """Compare gate, up, activation, product and output of the chosen layer on the prompt."""
    found = trace_layer(subject)
    mlp = subject.our_block.mlp
    x = found["mlp.input"]
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    steps = {
        "gate(x)": (gate, found["gate_proj.output"]),
        "up(x)": (up, found["up_proj.output"]),
        "silu(gate(x))": (F.silu(gate), found["act_fn.output"]),
        "silu(gate(x)) * up(x)": (F.silu(gate) * up, found["down_proj.input"]),
        "output": (mlp(x), found["mlp.output"]),
    }
    return Section(
        "swiglu",
        f"SwiGLU, layer {subject.layer}",
        prose=[
            "down(silu(gate(x)) * up(x)): two projections widen x, one of them decides by silu how "
            "much of the other passes, and a third returns to the old width.",
            "silu(g) = g / (1 + exp(-g)). It passes large positive gates and closes for "
            "negative ones, but not quite.",
            f"On the prompt {float((found['gate_proj.output'] < 0).float().mean()):.0%} of the "
            "gates are negative.",
        ],
        tables=[
            Table(
                "Steps",
                ("step", "shape", "largest |value|"),
                [
                    (name, " x ".join(map(str, theirs.shape)), f"{float(theirs.abs().max()):.4g}")
                    for name, (_, theirs) in steps.items()
                ],
            )
        ],
        pictures=[
            Picture(
                "swiglu",
                "silu, and how the gates of this layer are spread on the prompt.",
                [lambda axes: _draw(axes, found["gate_proj.output"].flatten().cpu())],
            )
        ],
        comparisons=[compare(name, ours, theirs) for name, (ours, theirs) in steps.items()],
    )


def _draw(axes: Any, gates: Tensor) -> None:
    limit = max(1.0, float(gates.abs().max()))
    g = torch.linspace(-limit, limit, 200)
    counts, edges = torch.histogram(gates, bins=40, range=(-limit, limit))
    height = counts / counts.max() * float(F.silu(g).max())
    width = float(edges[1] - edges[0])
    axes.bar(edges[:-1], height, width=width, align="edge", alpha=0.35, color="#8a8f98")
    axes.plot(g, F.silu(g), color="#2f7de1")
    axes.set_xlabel("gate g (grey: how often)")
    axes.set_ylabel("silu(g)")
