"""Rotary position embedding: angles, cos, sin, and its purpose (Su et al. 2021, eq. 34)."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from pipeline.model.decoder import rotate
from pipeline.study.section import Picture, Section, Table, compare
from pipeline.study.subject import Subject

_POSITIONS = 4096


@torch.no_grad()
def rope(subject: Subject) -> Section:
    """Compare parameters, cos and sin, rotated queries, and scores of rotated vectors."""
    theirs, ours = subject.theirs.model.rotary_emb, subject.ours.model.rotary
    length = min(_POSITIONS, subject.config.max_position_embeddings)
    positions = torch.arange(length, device=subject.device)[None]
    cos, sin = ours(positions)
    queries = torch.randn(
        1,
        subject.our_config.num_heads,
        length,
        cos.shape[-1],
        generator=torch.Generator().manual_seed(subject.seed),
    ).to(subject.device)
    their_cos, their_sin = theirs(queries, positions)
    rotated = sys.modules[type(theirs).__module__].apply_rotary_pos_emb
    their_queries, _ = rotated(queries, queries, their_cos, their_sin)
    ours_rotated = rotate(queries, cos, sin)
    exact = positions[0, :, None].double() * ours.inv_freq.double()
    half = exact.shape[-1]
    exact_cos = exact.cos() * ours.amplitude
    rounding = float((cos[0, 0, :, :half].double() - exact_cos).abs().max())
    return Section(
        "rope",
        "RoPE",
        prose=[
            f"Positions 0 to {length - 1}. Dimension i turns with dimension i + {half} (halves, "
            "not neighbours) by position x frequency: fast in the first pairs, hardly at all "
            "in the last. Plain RoPE has the frequencies theta^(-2i / E), E the width of a head.",
            f"Angles are float32 on both sides; cos itself is up to {rounding:.1e} from what "
            "float64 gives at these positions.",
        ],
        tables=[Table("Parameters", ("", "Hugging Face", "ours"), _parameters(subject))],
        pictures=[
            Picture(
                "rope",
                "cos of the angle over positions, for the first, a middle and the last pair.",
                [lambda axes: _draw(axes, cos[0, 0].cpu())],
            )
        ],
        comparisons=[
            compare("inverse frequencies, ours over theirs", *_ratios(ours, theirs)),
            compare("cos", cos[:, 0], their_cos),
            compare("sin", sin[:, 0], their_sin),
            compare("rotated queries", ours_rotated, their_queries),
            compare(
                "scores depend on the distance alone",
                *_scores_at_two_places(queries, cos, sin),
            ),
        ],
    )


def _ratios(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Return ours over theirs, and ones; frequencies of 1e-6 themselves would match any others."""
    return ours.inv_freq / theirs.inv_freq, torch.ones_like(theirs.inv_freq)


def _scores_at_two_places(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return scaled scores of a query and a key 3 positions apart, at the start and 8 later."""
    query, key = x[:, :, :1], x[:, :, 1:2]

    def score(place: int) -> Tensor:
        q = rotate(query, cos[:, :, place + 3, None], sin[:, :, place + 3, None])
        k = rotate(key, cos[:, :, place, None], sin[:, :, place, None])
        return (q * k).sum(-1) / math.sqrt(x.shape[-1])

    return score(8), score(0)


def _parameters(subject: Subject) -> list[tuple[object, ...]]:
    theirs, ours = subject.theirs.model.rotary_emb, subject.ours.model.rotary
    frequencies: list[Tensor] = [theirs.inv_freq, ours.inv_freq]
    stated, scaling = subject.config.rope_parameters, subject.our_config.rope_scaling

    def both(name: str, show: Any) -> tuple[object, ...]:
        return (name, *(show(frequency) for frequency in frequencies))

    return [
        ("variant", theirs.rope_type, "default" if scaling is None else scaling.rope_type),
        ("factor of cos and sin", theirs.attention_scaling, ours.amplitude),
        ("theta", stated["rope_theta"], subject.our_config.rope_theta),
        both("pairs", len),
        both("fastest, radians a position", lambda f: f"{float(f[0]):.6g}"),
        both("slowest, radians a position", lambda f: f"{float(f[-1]):.6g}"),
        both("longest wavelength, positions", lambda f: f"{2 * math.pi / float(f[-1]):,.0f}"),
        (
            "context, positions",
            f"{subject.config.max_position_embeddings:,}",
            f"{subject.our_config.max_seq_len:,}",
        ),
    ]


def _draw(axes: Any, cos: Tensor) -> None:
    half = cos.shape[-1] // 2
    shown = cos[:128]
    for pair, colour in ((0, "#c8453b"), (half // 2, "#e07b39"), (half - 1, "#2f7de1")):
        axes.plot(shown[:, pair], label=f"pair {pair}", color=colour, linewidth=1.2)
    axes.set_xlabel("position")
    axes.set_ylabel("cos")
