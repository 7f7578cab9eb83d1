"""The advice as lines for the terminal, a recommendation, and a plot."""

from __future__ import annotations

from typing import Any

from pipeline.planning.advise import ENOUGH_MASS, Advice
from pipeline.planning.cache_size import Mode
from pipeline.runtime.console import readable_bytes, readable_seconds
from pipeline.runtime.figures import draw_svg

_POINT = "D"  # matplotlib's marker of a mode that is not the top K alone


def table_lines(advice: Advice) -> list[str]:
    """Return the numbers by K, one line each under a heading."""
    temperatures = list(advice.kept[0].retained_mass)
    mass_head = "".join(f"{f'mass at {tau:g}':>13}" for tau in temperatures)
    lines = [f"{'K':>6}{mass_head}{'nats lost':>11}{'bytes/token':>15}{'corpus':>10}"]
    for kept in advice.kept:
        masses = "".join(f"{mass:>13.4f}" for mass in kept.retained_mass.values())
        lines.append(
            f"{kept.mode.k:>6}{masses}{kept.nats_lost:>11.4f}{kept.bytes_a_token:>15.1f}"
            f"{readable_bytes(kept.corpus_bytes):>10}"
        )
    return lines


def mode_lines(advice: Advice) -> list[str]:
    """Return the numbers of what may be kept instead, one line each, and what they mean."""
    mass_head = f"mass at {advice.temperature:g}"
    width = max(len(kept.mode.name) for kept in advice.modes) + 1
    lines = [
        f"{'kept':<{width}}{'positions':>9}{'ids':>7}{mass_head:>11}{'nats lost':>11}"
        f"{'bytes/token':>13}{'at [1.0]':>10}{'corpus':>10}"
    ]
    for kept in advice.modes:
        mark = "*" if kept.mode.num_sampled else " "
        lines.append(
            f"{kept.mode.name:<{width}}{kept.positions:>9.1%}{kept.num_ids:>7.1f}"
            f"{kept.retained_mass[advice.temperature]:>11.4f}{kept.nats_lost:>11.4f}{mark}"
            f"{kept.bytes_a_token:>12.1f}{kept.bytes_at_one:>10.1f}"
            f"{readable_bytes(kept.corpus_bytes):>10}"
        )
    lines.append("at [1.0]: bytes per token with prepare.temperatures=[1.0]")
    if any(kept.mode.num_sampled for kept in advice.modes):
        lines.append(
            "* nothing is lost on average over the draws: sampled ids make the target unbiased, "
            "with noise at each position"
            + ("" if advice.temperature == 1.0 else ", much of it at a temperature other than 1")
        )
    return lines


def position_line(advice: Advice) -> str:
    """Say what share of positions is in the loss, and what leaving out the others saves."""
    share, here = advice.share_in_loss, advice.modes[0]
    saved = readable_bytes(here.corpus_bytes * (1.0 / share - 1.0))
    return (
        f"{share:.1%} of positions are in the loss; the others (prompts, padding, ends of "
        f"documents and rows) take no head and no bytes: {here.mode.name} takes about {saved} less "
        "for it"
    )


def cost_lines(advice: Advice) -> list[str]:
    """Return sentences about capture time and break-even."""
    costs, positions = advice.costs, advice.corpus_positions
    lines = [
        f"capture of {advice.modes[0].mode.name} (prepare.*), an estimate: "
        f"{readable_seconds(costs.capture)} for {positions:,} tokens "
        f"({positions / costs.top_k:,.0f} tokens/s with the reduction, "
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
            f"no K up to {last.mode.k} keeps {ENOUGH_MASS:.0%} of the mass at {tau} (the largest "
            f"keeps {last.retained_mass[advice.temperature]:.1%}): lower the temperature or set "
            "prepare.num_sampled"
        )
    return (
        f"prepare.k={best.mode.k} is the smallest of advise.ks that keeps {ENOUGH_MASS:.0%} of the "
        f"mass at {tau}: {best.bytes_a_token:.1f} bytes per token, "
        f"{readable_bytes(best.corpus_bytes)} for the corpus"
    )


def plot(advice: Advice) -> str:
    """Draw an SVG of two panels by number of ids: retained mass, and bytes per token.

    Lines are the top K; single points are the other modes, by their mean number of ids.

    Raises:
        DecantError: matplotlib is not installed.
    """
    ks = [kept.mode.k for kept in advice.kept]
    others = [kept for kept in advice.modes if kept.mode != Mode(k=kept.mode.k)]

    def mass(axes: Any) -> None:
        for tau in advice.kept[0].retained_mass:
            masses = [kept.retained_mass[tau] for kept in advice.kept]
            axes.plot(ks, masses, "o-", ms=3, linewidth=1.6, label=f"temperature {tau:g}")
        for kept in others:
            if not kept.mode.num_sampled:
                axes.plot(kept.num_ids, kept.retained_mass[advice.temperature], _POINT, ms=5)
        axes.set_xlabel("ids per position")
        axes.set_ylabel("retained mass")
        axes.set_ylim(0.0, 1.02)

    def size(axes: Any) -> None:
        sizes = [kept.bytes_a_token for kept in advice.kept]
        axes.plot(ks, sizes, "o-", ms=3, linewidth=1.6, label="top K")
        for kept in others:
            axes.plot(kept.num_ids, kept.bytes_a_token, _POINT, ms=5, label=kept.mode.name)
        axes.set_xlabel("ids per position")
        axes.set_ylabel("bytes per token")
        axes.set_ylim(bottom=0.0)

    return draw_svg([mass, size], background="white")
