"""One decoder layer and its parts: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Each is computed by our code from the tensors that Hugging Face's layer had (trace.py).
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from pipeline.model.decoder import GQAAttention, RMSNorm, attend, attention_plain, rotate
from pipeline.study.comparison import Part, compare, largest, shape_of
from pipeline.study.subject import Subject
from pipeline.study.trace import trace_layer

_POSITIONS = 4096


@torch.no_grad()
def layer(subject: Subject) -> Part:
    """Save the chosen layer's input and output, read them back, and rerun both models' layers."""
    found = trace_layer(subject)
    kept = {name: found[name] for name in ("layer.input", "layer.output", "cos", "sin")}
    number = subject.layer
    name = f"layer_{number}.safetensors"
    content = save({key: tensor.contiguous().cpu() for key, tensor in kept.items()})
    read = {key: tensor.to(subject.device) for key, tensor in load(content).items()}
    x, cos, sin = read["layer.input"], read["cos"], read["sin"]
    causal = torch.full((x.shape[1],) * 2, -torch.inf, device=x.device).triu(1)[None, None]
    again = subject.theirs.model.layers[number](
        x, attention_mask=causal, position_embeddings=(cos, sin)
    )
    ours = subject.our_block(x, cos[:, None], sin[:, None], None)
    return Part(
        name="layer",
        title=f"Layer {number} alone",
        notes=[f"What enters and leaves the layer on the prompt is in {name}."],
        comparisons=[
            compare("Hugging Face's layer, run alone", again, read["layer.output"]),
            compare("our block", ours, read["layer.output"]),
        ],
        tables={
            "Saved": [
                ("tensor", "shape", "mean", "std", "largest |value|"),
                *(
                    (
                        key,
                        shape_of(t),
                        f"{float(t.mean()):.3g}",
                        f"{float(t.std()):.3g}",
                        largest(t),
                    )
                    for key, t in read.items()
                ),
            ]
        },
        files={name: content},
    )


@torch.no_grad()
def rmsnorm(subject: Subject) -> Part:
    """Compare the norms of the chosen layer, on their own input, and the final norm."""
    found = trace_layer(subject)
    norm, last = subject.ours.model.norm, found["layer.output"]
    norms: dict[str, tuple[RMSNorm, Tensor, Tensor]] = {}
    for path, module in subject.our_block.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, RMSNorm):
            norms[name] = module, found[f"{name}.input"], found[f"{name}.output"]
    norms["norm, on this layer's output"] = (norm, last, subject.theirs.model.norm(last))
    rows: list[tuple[object, ...]] = [
        ("norm", "mean of x", "mean of x^2", "mean after", "mean square after", "LayerNorm off")
    ]
    for name, (ours, x, _) in norms.items():
        unit = RMSNorm(x.shape[-1], ours.eps).to(x.device)(x)  # before the weight is applied
        centred = F.layer_norm(x, x.shape[-1:], eps=ours.eps)
        numbers = (x.mean(), x.square().mean(), unit.mean(), unit.square().mean())
        apart = f"{float((unit - centred).abs().max()):.3g}"
        rows.append((name, *(f"{float(number):.6g}" for number in numbers), apart))
    return Part(
        name="rmsnorm",
        title=f"RMSNorm, layer {subject.layer}",
        notes=[
            "y = x / sqrt(mean(x^2) + eps) * weight normalises the mean square and keeps the mean. "
            f"eps = {norm.eps:g}. The last column is how far LayerNorm, which subtracts the mean, "
            "would be off."
        ],
        comparisons=[compare(name, ours(x), theirs) for name, (ours, x, theirs) in norms.items()],
        tables={"Before and after, without the weight": rows},
    )


@torch.no_grad()
def rope(subject: Subject) -> Part:
    """Compare parameters, cos and sin, rotated queries, and scores of rotated vectors."""
    theirs, ours = subject.theirs.model.rotary_emb, subject.ours.model.rotary
    length = min(_POSITIONS, subject.config.max_position_embeddings)
    positions = torch.arange(length, device=subject.device)[None]
    cos, sin = ours(positions)
    shape = (1, subject.our_config.num_heads, length, cos.shape[-1])
    generator = torch.Generator().manual_seed(subject.seed)
    queries = torch.randn(shape, generator=generator).to(subject.device)
    their_cos, their_sin = theirs(queries, positions)
    apply = sys.modules[type(theirs).__module__].apply_rotary_pos_emb
    their_queries, _ = apply(queries, queries, their_cos, their_sin)
    exact = (positions[0, :, None].double() * ours.inv_freq.double()).cos() * ours.amplitude
    half = exact.shape[-1]
    rounding = float((cos[0, 0, :, :half].double() - exact).abs().max())
    # The ratio, since any two frequencies of 1e-6 would agree within an absolute limit.
    ratios = ours.inv_freq / theirs.inv_freq
    return Part(
        name="rope",
        title="RoPE",
        notes=[
            f"Positions 0 to {length - 1}; dimension i turns with dimension i + {half}, its "
            "counterpart in the other half.",
            f"Angles are float32 on both sides; cos is up to {rounding:.1e} from float64's.",
        ],
        comparisons=[
            compare("inverse frequencies, ours over theirs", ratios, torch.ones_like(ratios)),
            compare("cos", cos[:, 0], their_cos),
            compare("sin", sin[:, 0], their_sin),
            compare("rotated queries", rotate(queries, cos, sin), their_queries),
            compare(
                "scores depend on the distance alone",
                _score_3_apart(queries, cos, sin, 8),
                _score_3_apart(queries, cos, sin, 0),
            ),
        ],
        tables={"Parameters": [("", "Hugging Face", "ours"), *_rope_parameters(subject)]},
    )


def _score_3_apart(x: Tensor, cos: Tensor, sin: Tensor, place: int) -> Tensor:
    """Return the scaled score of a query at place + 3 and a key at `place`."""
    q = rotate(x[:, :, :1], cos[:, :, place + 3, None], sin[:, :, place + 3, None])
    k = rotate(x[:, :, 1:2], cos[:, :, place, None], sin[:, :, place, None])
    return (q * k).sum(-1) / math.sqrt(x.shape[-1])


def _rope_parameters(subject: Subject) -> list[tuple[object, ...]]:
    theirs, ours = subject.theirs.model.rotary_emb, subject.ours.model.rotary
    scaling, (a, b) = subject.our_config.rope_scaling, (theirs.inv_freq, ours.inv_freq)
    return [
        ("variant", theirs.rope_type, "default" if scaling is None else scaling.rope_type),
        ("factor of cos and sin", theirs.attention_scaling, ours.amplitude),
        ("theta", subject.config.rope_parameters["rope_theta"], subject.our_config.rope_theta),
        ("pairs", len(a), len(b)),
        ("fastest, radians per position", f"{float(a[0]):.6g}", f"{float(b[0]):.6g}"),
        ("slowest, radians per position", f"{float(a[-1]):.6g}", f"{float(b[-1]):.6g}"),
        (
            "context, positions",
            f"{subject.config.max_position_embeddings:,}",
            f"{subject.our_config.max_seq_len:,}",
        ),
    ]


@torch.no_grad()
def gqa(subject: Subject) -> Part:
    """Compare every step of the chosen layer's attention on the prompt (Ainslie et al. 2023).

    The fused kernel of our model hides its intermediate values, so the steps come from its plain
    twin, and the fused output is compared as well.
    """
    found = trace_layer(subject)
    attention = subject.our_block.self_attn
    x, cos, sin = found["input_layernorm.output"], found["cos"][:, None], found["sin"][:, None]
    steps = attention_steps(attention, x, cos, sin)
    heads, groups = subject.our_config.num_heads, subject.our_config.num_kv_heads
    shared = heads // groups
    query, key, value = steps["query"], steps["key"], steps["value"]
    repeated = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    return Part(
        name="gqa",
        title=f"Grouped-query attention, layer {subject.layer}",
        notes=[
            f"{heads} query heads, {groups} key/value heads of {attention.head_size} dimensions: "
            f"each key/value head serves {shared} query heads, and the cache is {shared} times "
            "smaller than with one for each.",
            _order_matters(steps, heads, groups),
        ],
        comparisons=[
            *(
                compare(title, _visible(name, steps[name]), _visible(name, found[traced]))
                for name, (traced, title) in _STEPS.items()
            ),
            compare(
                "output of the fused kernel",
                attention(x, cos, sin, None),
                found["self_attn.output"],
            ),
            compare(
                "shared heads against heads repeated in memory",
                F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
                attend(query, *repeated, None, dropout=0.0),
            ),
        ],
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

    query = rotate(attention.q_norm(by_head(q)), cos, sin)
    key, value = rotate(attention.k_norm(by_head(k)), cos, sin), by_head(v)
    mixed, weights, scores = attention_plain(query, key, value)
    output = attention.o_proj(mixed.transpose(1, 2).flatten(-2))
    return dict(zip(_STEPS, (q, k, v, query, key, value, scores, weights, output), strict=True))


def _visible(name: str, tensor: Tensor) -> Tensor:
    """Keep only the used scores: above the diagonal, each model masks in its own way."""
    return tensor.tril() if name == "scores" else tensor


def _order_matters(steps: dict[str, Tensor], heads: int, groups: int) -> str:
    if groups in (1, heads):
        return "With these numbers of heads, any order of repeating is the same."
    query, key = steps["query"], steps["key"]
    wrong = query @ key.repeat(1, heads // groups, 1, 1).mT / math.sqrt(query.shape[-1])
    apart = float((wrong.tril() - steps["scores"].tril()).abs().max())
    right = " ".join(str(head // (heads // groups)) for head in range(heads))
    other = " ".join(str(head % groups) for head in range(heads))
    return (
        f"By query head, the key/value head is {right}. The other order, {other}, would move "
        f"scores by up to {apart:.3g}."
    )


@torch.no_grad()
def swiglu(subject: Subject) -> Part:
    """Compare gate, up, activation, product and output of the chosen layer on the prompt."""
    found = trace_layer(subject)
    mlp = subject.our_block.mlp
    x = found["mlp.input"]
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    steps: dict[str, tuple[Any, Tensor]] = {
        "gate(x)": (gate, found["gate_proj.output"]),
        "up(x)": (up, found["up_proj.output"]),
        "silu(gate(x))": (F.silu(gate), found["act_fn.output"]),
        "silu(gate(x)) * up(x)": (F.silu(gate) * up, found["down_proj.input"]),
        "output": (mlp(x), found["mlp.output"]),
    }
    negative = float((found["gate_proj.output"] < 0).float().mean())
    return Part(
        name="swiglu",
        title=f"SwiGLU, layer {subject.layer}",
        notes=[f"down(silu(gate(x)) * up(x)); {negative:.0%} of the gates are negative here."],
        comparisons=[compare(name, ours, theirs) for name, (ours, theirs) in steps.items()],
    )
