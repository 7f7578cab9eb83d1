"""What the gate writes: GateReport in metrics.json, a list of HistogramBin in histogram.json.

The report reads both back as these dataclasses, so this module imports neither torch nor the gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from pydantic import FiniteFloat


@dataclass(frozen=True, kw_only=True)
class GateSummary:
    """Means over positions, except for three extremes; None for what the cache does not store."""

    mean_cosine: float  # of probabilities, or of counts where these are all that is stored
    min_cosine: float
    worst_row_cosine: float  # the lowest row mean
    mean_kl: float | None  # nats
    max_kl: float | None  # nats
    top1: float | None
    overlap: float | None
    logprob_error: float | None  # nats
    lse_error: float | None  # nats
    lse_tau_error: float | None  # nats
    entropy_error: float | None  # nats
    entropy_gap: float | None  # nats
    sampled_agreement: float | None

    def __str__(self) -> str:
        likeness = {
            "mean cosine {:.6f}": self.mean_cosine,
            "KL {:.2e}": self.mean_kl,
            "top-1 {:.4f}": self.top1,
            "overlap {:.4f}": self.overlap,
            "sampled ids {:.4f}": self.sampled_agreement,
        }
        errors = {
            "{:.1e} in log-probabilities": self.logprob_error,
            "{:.1e} in lse": self.lse_error,
            "{:.1e} in lse_tau": self.lse_tau_error,
            "{:.1e} in entropy": self.entropy_error,
            "{:.1e} in the choice by entropy": self.entropy_gap,
        }
        said, off = (
            ", ".join(words.format(value) for words, value in values.items() if value is not None)
            for values in (likeness, errors)
        )
        return f"{said}, off by {off}"


@dataclass(frozen=True, kw_only=True)
class Levels:
    """A quantity's error at each level: its limit, or the smallest error that is detected."""

    mean: float
    worst_row: float
    position: float | None  # None: one position proves nothing


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest errors that pass the gate."""

    errors: dict[str, Levels]  # by quantity
    signed: dict[str, float]  # by name


@dataclass(frozen=True, kw_only=True)
class FitTest:
    """A statistic of the sampled ids, and the interval in which it must lie."""

    name: str
    value: float
    low: float
    high: float
    found: float  # true values from here on are detected with probability POWER (power.py)

    @property
    def passed(self) -> bool:
        """Whether the value lies within the interval; NaN does not."""
        return self.low <= self.value <= self.high


@dataclass(frozen=True, kw_only=True)
class Found:
    """The smallest faults that this check detects in 95 of 100 caches that have them."""

    errors: dict[str, Levels]  # by quantity
    signed: dict[str, float]  # by name, nats
    sampled: dict[str, float]  # by test
    wrong_positions: float  # share, wherever they are
    wrong_shards: int
    shards: int
    shards_seen: int
    batches_for: dict[str, int]  # the verify.batches that would detect each smaller fault

    def __str__(self) -> str:
        names = {"kl": "KL", "logprobs": "log-probabilities", "lse": "lse", "entropy": "entropy"}
        errors = (
            f"{words} {self.errors[name].mean:.1e}"
            for name, words in names.items()
            if name in self.errors
        )
        share = f"{100.0 * self.wrong_positions:.2g} % of positions wrong"
        beyond = {
            "one position in 1,000": self.wrong_positions > 0.001,
            "one shard in 100": self.wrong_shards > ceil(self.shards / 100),
            "one shard": self.wrong_shards > 1,
        }
        more = [f"{what} {self.batches_for[what]:,}" for what in beyond if beyond[what]]
        return (
            f"errors of {', '.join(errors)} nats or more, {share}, "
            f"{self.wrong_shards} of {self.shards:,} shards wrong"
            + (f" (it takes verify.batches to find {', '.join(more)})" if more else "")
        )


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """The result of the gate."""

    batches: int
    rows: int
    tokens: int
    capture_engine: str  # with its settings, as in the cache's fingerprint
    noise_engine: str
    live_engine: str
    cache: GateSummary
    noise_floor: GateSummary
    negative_control: GateSummary
    limits: Limits
    sampling_tests: dict[str, FitTest]  # by name
    found: Found
    failures: list[str]  # sentences; empty when the gate passes

    @property
    def passed(self) -> bool:
        """Whether the cache may be used."""
        return not self.failures

    def lines(self) -> list[str]:
        """Return the lines for the terminal."""
        said = {
            "cache against teacher": self.cache,
            "noise floor": self.noise_floor,
            "negative control": self.negative_control,
        }
        lines = [f"{name:22} {summary}" for name, summary in said.items()]
        if self.capture_engine != self.live_engine:
            engines = f"cache by {self.capture_engine}, noise floor by {self.noise_engine}"
            lines.insert(0, f"{'engines':22} {engines}, judged by {self.live_engine}")
        if self.sampling_tests:
            tests = (
                f"{name} {t.value:.3f} ({t.low:.3f} to {t.high:.3f})"
                for name, t in self.sampling_tests.items()
            )
            lines.append(f"{'sampled ids':22} " + ", ".join(tests))
        return [*lines, f"{'found at 95 %':22} {self.found}"]


@dataclass(frozen=True, kw_only=True)
class HistogramBin:
    """The share of a series' positions in a bin of log10(1 - cosine), given by its lower edge."""

    series: str
    log10_one_minus_cosine: FiniteFloat
    share: FiniteFloat
