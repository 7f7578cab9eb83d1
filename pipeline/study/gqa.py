"""Grouped-query attention step by step (Ainslie et al. 2023): Q, K, V, scores, weights, output.

The fused kernel that our model uses hides its intermediate values. So the steps come from its plain
twin, and the fused output is compared as well.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.model.decoder import GQAAttention, attend, attention_plain, rotate
from pipeline.runtime.figures import INK
from pipeline.study.section import Comparison, Picture, Section, Table, compare
from pipeline.study.subject import Subject
from pipeline.study.trace import trace_layer

_MAPS = 3


@torch.no_grad()
def gqa(subject: Subject) -> Section:
    """Show all intermediates of the chosen layer's attention on the prompt, and how heads share."""
    found = trace_layer(subject)
    attention = subject.our_block.self_attn
    x, cos, sin = found["input_layernorm.output"], found["cos"][:, None], found["sin"][:, None]
    steps = attention_steps(attention, x, cos, sin)
    heads, groups = subject.our_config.num_heads, subject.our_config.num_kv_heads
    comparisons = [
        compare(title, _visible(name, steps[name]), _visible(name, found[theirs]))
        for name, (theirs, title) in _STEPS.items()
    ]
    fused = attention(x, cos, sin, None)
    comparisons.append(compare("output of the fused kernel", fused, found["self_attn.output"]))
    return Section(
        "gqa",
        f"Grouped-query attention, layer {subject.layer}",
        prose=[
            f"{heads} query heads, {groups} key/value heads of {attention.head_size} dimensions: "
            f"each key/value head serves {heads // groups} query heads, and the cache is "
            f"{heads // groups} times smaller than with a key/value head for each.",
            "Q, K and V are linear in x; Q and K are rotated; a query sees the keys up to its own "
            "position. What comes out is o(softmax(Q K^T / sqrt(E)) V).",
            _order_matters(steps, heads, groups),
        ],
        tables=[
            Table(
                "Steps",
                ("step", "shape", "largest |value|"),
                [
                    (
                        title,
                        " x ".join(map(str, found[theirs].shape)),
                        _largest(_visible(name, found[theirs])),
                    )
                    for name, (theirs, title) in _STEPS.items()
                ],
            ),
            Table(
                "How key/value heads are shared",
                ("key/value head", "query heads"),
                [(g, _heads_of(g, heads // groups)) for g in range(groups)],
            ),
        ],
        pictures=[_maps(found["weights"][0].cpu(), heads // groups)],
        comparisons=[*comparisons, _explicit_repeat(steps)],
    )


_STEPS = {
    "q": ("q_proj.output", "Q"),
    "k": ("k_proj.output", "K"),
    "v": ("v_proj.output", "V"),
    "query": ("query", "Q, rotated, by head"),
    "key": ("key", "K, rotated, by head"),
    "value": ("value", "V, by head"),
    "scores": ("scores", "scores Q K^T / sqrt(E), causal part"),
    "weights": ("weights", "weights softmax(scores)"),
    "output": ("self_attn.output", "output"),
}
"""Our step -> its name in the trace, and its title in the report."""


def attention_steps(
    attention: GQAAttention, x: Tensor, cos: Tensor, sin: Tensor
) -> dict[str, Tensor]:
    """Compute the attention step by step; names and shapes as in pipeline/study/trace.py."""
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)

    def by_head(y: Tensor) -> Tensor:  # [B, L, heads * E] -> [B, heads, L, E]
        return y.view(*y.shape[:2], -1, attention.head_size).transpose(1, 2)

    query, key, value = rotate(by_head(q), cos, sin), rotate(by_head(k), cos, sin), by_head(v)
    mixed, weights, scores = attention_plain(query, key, value)
    output = attention.o_proj(mixed.transpose(1, 2).flatten(-2))
    names = ("q", "k", "v", "query", "key", "value", "scores", "weights", "output")
    tensors = (q, k, v, query, key, value, scores, weights, output)
    return dict(zip(names, tensors, strict=True))


def _visible(name: str, tensor: Tensor) -> Tensor:
    """Keep only the used scores: above the diagonal, each model masks in its own way."""
    return tensor.tril() if name == "scores" else tensor


def _explicit_repeat(steps: dict[str, Tensor]) -> Comparison:
    """Compare grouped heads in the kernel with keys and values repeated in memory."""
    query, key, value = steps["query"], steps["key"], steps["value"]
    shared = query.shape[1] // key.shape[1]
    repeated = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    return compare(
        "shared heads against heads repeated in memory",
        attend(query, key, value, None, dropout=0.0),
        attend(query, *repeated, None, dropout=0.0),
    )


def _order_matters(steps: dict[str, Tensor], heads: int, groups: int) -> str:
    if groups in (1, heads):
        return "With these numbers of heads, any order of repeating is the same."
    query, key = steps["query"], steps["key"]
    wrong = query @ key.repeat(1, heads // groups, 1, 1).mT / math.sqrt(query.shape[-1])
    apart = float((wrong.tril() - steps["scores"].tril()).abs().max())
    shared = heads // groups
    right = " ".join(str(head // shared) for head in range(heads))
    other = " ".join(str(head % groups) for head in range(heads))
    return (
        f"By query head, the key/value head is {right}. The other order, {other}, would move "
        f"scores by up to {apart:.3g}."
    )


def _heads_of(group: int, shared: int) -> str:
    return ", ".join(map(str, range(group * shared, (group + 1) * shared)))


def _largest(tensor: Tensor) -> str:
    return f"{float(tensor.abs().max()):.4g}"


def _maps(weights: Tensor, shared: int) -> Picture:
    """Draw the weights [H, L, L] of the first query heads."""
    shown = min(_MAPS, len(weights))

    def draw(head: int, axes: Any) -> None:
        axes.pcolormesh(weights[head].numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.invert_yaxis()
        axes.set_xlabel("key position")
        axes.set_ylabel("query position")
        axes.set_title(f"query head {head}, key/value head {head // shared}", color=INK)

    return Picture(
        "attention",
        f"Attention weights of the first {shown} query heads; white is 0, dark is 1.",
        [partial(draw, head) for head in range(shown)],
        inches=(3.4, 3.1),
    )
