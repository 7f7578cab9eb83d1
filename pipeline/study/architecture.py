"""The model's structure: its tree of modules, its hyper-parameters, and a graph of the decoder."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from pipeline.model.weights import OUT_BIAS
from pipeline.runtime.figures import INK
from pipeline.study.section import Comparison, Picture, Section, Table
from pipeline.study.subject import Subject

_OUR_NAMES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_size (hidden_size / num_heads)",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size (embedding rows)",
    "max_position_embeddings": "max_seq_len",
    "rope_parameters": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "hidden_act": "silu, always",
    "attention_bias": "attention_bias (q, k, v)",
    "attention_dropout": "dropout",
    "tie_word_embeddings": "tie_embeddings",
}
"""Hugging Face's key of config.json -> our field."""


def architecture(subject: Subject) -> Section:
    """Show the module tree, counts, hyper-parameters under both names, and a drawn graph."""
    model = subject.theirs
    parameters = sum(parameter.numel() for parameter in model.parameters())
    section = Section(
        "architecture",
        "Architecture",
        prose=[
            f"{type(model).__name__}, {parameters:,} parameters, a tied matrix counted once. Layers"
            " that are alike stand in one line of the tree."
        ],
        texts=[("Modules", module_tree(model))],
        tables=[
            Table(
                "Hyper-parameters",
                ("Hugging Face's key", "value", "ours"),
                [
                    (key, getattr(subject.config, key), ours)
                    for key, ours in _OUR_NAMES.items()
                    if hasattr(subject.config, key)
                ],
            ),
            Table("Modules by class", ("class", "count", "parameters"), _by_class(model)),
        ],
    )
    if not subject.unsupported:
        section.pictures.append(
            Picture(
                "architecture",
                "From ids to logits. A circle adds what went round the box; shapes are batch B, "
                "length L and widths.",
                [lambda axes: draw_graph(axes, subject.config)],
                inches=(6.4, 7.2),
            )
        )
        zeros = (p.numel() for name, p in model.named_parameters() if name.endswith(OUT_BIAS))
        ours = subject.ours.count_parameters() + sum(zeros)  # see pipeline/model/weights.py
        difference = float(abs(ours - parameters))
        section.comparisons.append(Comparison("number of parameters", difference, 0))
    return section


def module_tree(model: nn.Module, name: str = "", depth: int = 0) -> str:
    """Return one line per module, with name and class; equal entries of a list appear once."""
    described = model.extra_repr().replace("\n", " ") if not list(model.children()) else ""
    lines = ["  " * depth + f"{name}{': ' if name else ''}{type(model).__name__}({described})"]
    if isinstance(model, nn.ModuleList) and len({repr(child) for child in model}) == 1:
        children = [(f"0..{len(model) - 1}", model[0])]
    else:
        children = list(model.named_children())
    lines += [module_tree(child, label, depth + 1) for label, child in children]
    return "\n".join(lines)


def _by_class(model: nn.Module) -> list[tuple[object, ...]]:
    """Return class, number of modules, own parameters (a tied matrix at its first owner)."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    for module in model.modules():
        kind = type(module).__name__
        counts[kind] += 1
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                sizes[kind] += parameter.numel()
    return [(kind, count, f"{sizes[kind]:,}") for kind, count in counts.items()]


def draw_graph(axes: Any, config: Any) -> None:
    """Draw embedding -> N x decoder layer (attention, MLP) -> RMSNorm -> head, upwards.

    Args:
        config: Hugging Face's, of a qwen2 or llama model; other families have another structure.
    """
    axes.set_axis_off()
    axes.set(xlim=(0, 10), ylim=(0, 15.2))
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    tied = ", the embedding's matrix" if config.tie_word_embeddings else ""

    _text(axes, 5, 0.2, "ids  [B, L]")
    _box(axes, 1.0, "embed_tokens", f"{v:,} x {d}", "#8a8f98")
    axes.add_patch(_rounded(1.4, 2.7, 7.2, 8.4, INK, alpha=0.05))
    axes.text(8.4, 2.9, f"{config.num_hidden_layers} x decoder layer", ha="right", color=INK)
    _box(axes, 3.6, "input_layernorm", "RMSNorm", "#2f9e8f")
    _box(axes, 4.9, "self_attn", f"{heads} query heads, {groups} key/value heads", "#2f7de1")
    _plus(axes, 6.55)
    _box(axes, 7.2, "post_attention_layernorm", "RMSNorm", "#2f9e8f")
    _box(axes, 8.5, "mlp", f"SwiGLU, {d} -> {f} -> {d}", "#e07b39")
    _plus(axes, 10.15)
    _box(axes, 11.6, "norm", "RMSNorm", "#2f9e8f")
    _box(axes, 12.9, "lm_head", f"{d} x {v:,}{tied}", "#8a8f98")
    _text(axes, 5, 14.75, "logits  [B, L, V]")
    for start, end in _ARROWS:
        _arrow(axes, (5, start), (5, end))
    for start, end in ((3.2, 6.55), (6.9, 10.15)):  # residual connections of both halves
        axes.plot([5, 2.0, 2.0], [start, start, end], color=INK, linewidth=1)
        _arrow(axes, (2.0, end), (4.75, end))
    _text(axes, 8.1, 6.55, f"[B, L, {d}]")


_ARROWS = (
    (0.45, 1.0),
    (1.9, 3.6),
    (4.5, 4.9),
    (5.8, 6.3),
    (6.8, 7.2),
    (8.1, 8.5),
    (9.4, 9.9),
    (10.4, 11.6),
    (12.5, 12.9),
    (13.8, 14.5),
)


def _rounded(x: float, y: float, width: float, height: float, colour: str, alpha: float) -> Any:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.15",
        facecolor=to_rgba(colour, alpha),
        edgecolor=to_rgba(colour, min(1.0, 5 * alpha)),
    )


def _box(axes: Any, bottom: float, name: str, about: str, colour: str) -> None:
    axes.add_patch(_rounded(2.6, bottom, 4.8, 0.9, colour, alpha=0.2))
    axes.text(5, bottom + 0.6, name, ha="center", va="center", color=INK, weight="bold")
    axes.text(5, bottom + 0.26, about, ha="center", va="center", color=INK, fontsize=8)


def _plus(axes: Any, y: float) -> None:
    axes.plot([5], [y], "o", markersize=15, markerfacecolor="none", color=INK)
    _text(axes, 5, y - 0.02, "+")


def _text(axes: Any, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center", color=INK)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "->", "color": INK, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
