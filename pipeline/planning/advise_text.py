"""The advice as lines for the terminal, a recommendation, and a plot."""

from __future__ import annotations

from typing import Any

from pipeline.planning.advise import ENOUGH_MASS, Advice
from pipeline.runtime.console import (
    readable_bytes,
    readable_seconds,
)
from pipeline.runtime.figures import draw_svg


def table_lines(advice: Advice) -> list[str]:
    """Return the numbers by K, one line each under a heading."""
    temperatures = list(advice.kept[0].retained_mass)
    mass_head = "".join(f"{f'mass at {tau:g}':>13}" for tau in temperatures)
    lines = [f"{'K':>6}{mass_head}{'nats lost':>11}{'bytes/token':>15}{'corpus':>10}"]
    for kept in advice.kept:
        masses = "".join(f"{mass:>13.4f}" for mass in kept.retained_mass.values())
        lines.append(
            f"{kept.k:>6}{masses}{kept.nats_lost:>11.4f}{kept.bytes_a_token:>15.1f}"
            f"{readable_bytes(kept.corpus_bytes):>10}"
        )
    return lines


def cost_lines(advice: Advice) -> list[str]:
    """Return sentences about capture time and break-even."""
    costs, positions = advice.costs, advice.corpus_positions
    lines = [
        f"capture at prepare.k={advice.prepare_k}, an estimate: "
        f"{readable_seconds(costs.capture)} for {positions:,} tokens "
        f"({positions / costs.top_k:,.0f} tokens/s to the top K, "
        f"{positions / costs.forward:,.0f} for the teacher's logits alone)"
    ]
    online = f"{readable_seconds(costs.top_k)} per epoch with an online teacher"
    decode = f"{readable_seconds(costs.decode)} per epoch to decode the cache"
    if advice.break_even_epochs is None:
        return [*lines, f"caching does not pay: {decode}, {online}"]
    return [
        *lines,
        f"caching pays from epoch {advice.break_even_epochs:,} on, counted across all runs: "
        f"{decode}, {online}",
        f"runs of train.* that make that many epochs, at {advice.epochs_per_run:.2g} epochs each: "
        f"{advice.break_even_runs}",
    ]


def recommendation(advice: Advice) -> str:
    """Return one sentence: the smallest K that keeps enough, and its cost."""
    best, tau = advice.recommended, f"temperature {advice.temperature:g}"
    if best is None:
        last = advice.kept[-1]
        return (
            f"no K up to {last.k} keeps {ENOUGH_MASS:.0%} of the mass at {tau} (the largest keeps "
            f"{last.retained_mass[advice.temperature]:.1%}): lower the temperature or set "
            "prepare.num_sampled"
        )
    return (
        f"prepare.k={best.k} is the smallest of advise.ks that keeps {ENOUGH_MASS:.0%} of the mass "
        f"at {tau}: {best.bytes_a_token:.1f} bytes per token, "
        f"{readable_bytes(best.corpus_bytes)} for the corpus"
    )


def plot(advice: Advice) -> str:
    """Draw an SVG of two panels by K: retained mass at each temperature, and bytes per token.

    Raises:
        DecantError: matplotlib is not installed.
    """
    ks = [kept.k for kept in advice.kept]

    def mass(axes: Any) -> None:
        for tau in advice.kept[0].retained_mass:
            masses = [kept.retained_mass[tau] for kept in advice.kept]
            axes.plot(ks, masses, "o-", ms=3, linewidth=1.6, label=f"temperature {tau:g}")
        axes.set_xlabel("K")
        axes.set_ylabel("retained mass")
        axes.set_ylim(0.0, 1.02)

    def size(axes: Any) -> None:
        sizes = [kept.bytes_a_token for kept in advice.kept]
        axes.plot(ks, sizes, "o-", ms=3, linewidth=1.6)
        axes.set_xlabel("K")
        axes.set_ylabel("bytes per token")
        axes.set_ylim(bottom=0.0)

    return draw_svg([mass, size], background="white")
