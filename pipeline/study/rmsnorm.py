"""RMSNorm: the mean SQUARE is normalised, the mean is kept (Zhang & Sennrich 2019, eq. 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.decoder import RMSNorm
from pipeline.study.section import Comparison, Section, Table, compare
from pipeline.study.subject import Subject
from pipeline.study.trace import trace_layer


@torch.no_grad()
def rmsnorm(subject: Subject) -> Section:
    """Compare both norms of the chosen layer, on their own input, and the final norm."""
    found = trace_layer(subject)
    block, norm = subject.our_block, subject.ours.model.norm
    last = found["layer.output"]
    norms: dict[str, tuple[RMSNorm, Tensor, Tensor]] = {
        name: (getattr(block, name), found[f"{name}.input"], found[f"{name}.output"])
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    norms["norm, on this layer's output"] = (norm, last, subject.theirs.model.norm(last))
    rows = []
    comparisons: list[Comparison] = []
    for name, (ours, x, theirs) in norms.items():
        comparisons.append(compare(name, ours(x), theirs))
        unit = RMSNorm(x.shape[-1], ours.eps).to(x.device)(x)  # before the weight is applied
        centred = F.layer_norm(x, x.shape[-1:], eps=ours.eps)
        rows.append(
            (
                name,
                f"{float(x.mean()):.3g}",
                f"{float(x.square().mean()):.4g}",
                f"{float(unit.mean()):.3g}",
                f"{float(unit.square().mean()):.6f}",
                f"{float((unit - centred).abs().max()):.3g}",
            )
        )
    header = (
        "norm",
        "mean of x",
        "mean of x^2",
        "mean after",
        "mean square after",
        "LayerNorm off",
    )
    return Section(
        "rmsnorm",
        f"RMSNorm, layer {subject.layer}",
        prose=[
            "y = x / sqrt(mean(x^2) + eps) * weight. After it, before the weight, the mean square "
            "is 1 and the mean is what it was, divided; eps keeps the mean square a little below 1 "
            "where x is small. The last column says how far LayerNorm, which subtracts the mean, "
            "would be off.",
            f"eps = {norm.eps:g}; statistics are float32 whatever the number format.",
        ],
        tables=[Table("What it does", header, rows)],
        comparisons=comparisons,
    )
