"""The limits of the gate, and the smallest error that exceeds them.

The noise floor is measured on a part of the rows. From it follow bounds on the errors of correct
caches elsewhere, for each quantity and level:

    mean        over all positions: noise_factor times the floor's mean, at most the ceiling in
                verify.*
    worst row   noise_factor times the floor's worst row
    position    noise_factor times the floor's worst position times sqrt(n / n_0), as the largest of
                n values grows if tails fall as x^-2 or faster; WRONG_SHARE of the positions may
                exceed it
    signed      the mean over all positions: noise_factor times the largest mean of the floor's rows

A share that is 0 in n_0 trials may in truth be 3 / n_0 (the rule of three: Hanley & Lippman-Hand
1983, "If Nothing Goes Wrong, Is Everything All Right?"), which is added to the floor of shares. No
limit is below a quantity's resolution, since passes that round alike have no noise at all, while
passes on other hardware do. For shares with large noise, a further rule applies to the mean and to
the worst row: the limit requires at least half of the agreement that the noise floor has, so that
draws from another distribution fail.

Quantities that a cache lacks are left out (`agreement.comparable`). If all that it stores are
counts of sampled ids, the cosine is that of the counts, which noise changes as it does the sampled
ids, so that it has no ceiling either.

Shapes: n positions, C signed errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from pipeline.config.cache_params import VerifyParams
from pipeline.verify.agreement import Agreement
from pipeline.verify.gate_report import Levels, Limits
from pipeline.verify.power import POWER

WRONG_SHARE = 1e-4  # share of positions that may exceed their limit
NATS = 1e-3  # an error below this is never a fault


@dataclass(frozen=True)
class Quantity:
    """An error at each position: a field of Agreement, or 1 minus the field."""

    name: str
    words: str  # its name in sentences, after "mean"
    resolution: float
    likeness: bool = False  # 1 is perfect, and the error is 1 minus the value

    def errors(self, agreement: Agreement) -> Tensor:
        """Return the errors [n], which are 0 where said and live are equal."""
        values: Tensor = getattr(agreement, self.name)
        return 1.0 - values if self.likeness else values


QUANTITIES = (
    Quantity("cosine", "cosine", 1e-5, likeness=True),
    Quantity("kl", "KL", 1e-4),  # a few noise rows miss the rare positions that make most of a mean
    Quantity("top1", "top-1 agreement", 1e-3, likeness=True),
    Quantity("overlap", "overlap of ids", 1e-3, likeness=True),
    Quantity("logprobs", "error of log-probabilities", NATS),
    Quantity("lse", "error of lse", NATS),
    Quantity("lse_tau", "error of lse_tau", NATS),
    Quantity("entropy", "error of entropy", NATS),
    Quantity("entropy_gap", "entropy gap of the chosen positions", NATS),
    Quantity("sampled", "agreement of sampled ids", 1e-3, likeness=True),
)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The comparison of a cache with the live teacher."""

    agreement: Agreement
    rows: Tensor  # int64 [n], the number of each position's row among those examined
    columns: Tensor  # int64 [n], the place of each position in its row
    signed_names: list[str]  # the columns of agreement.signed
    quantities: list[Quantity]  # those that can be compared

    def __len__(self) -> int:
        return len(self.rows)

    def row_means(self, values: Tensor) -> tuple[list[int], Tensor]:
        """Return the rows that have positions, and the means of values [n, ...] there, float64."""
        numbers, place = np.unique(self.rows.numpy(), return_inverse=True)
        counts = torch.from_numpy(np.bincount(place)).double()
        flat = values.double().reshape(len(values), -1)
        sums = flat.new_zeros(len(numbers), flat.shape[1])
        sums.index_add_(0, torch.from_numpy(place), flat)
        return numbers.tolist(), (sums / counts[:, None]).reshape(-1, *values.shape[1:])


def limits_from(
    noise: Compared,
    size: int,
    params: VerifyParams,
    *,
    k: int,
    num_sampled: int,
    top_p: float | None = None,
) -> Limits:
    """Return the limits that a noise floor sets for a cache with `size` examined positions."""
    factor = params.noise_factor
    tails = max(1.0, sqrt(size / len(noise)))
    # One id more or less, of two at least where a cut may be noisy.
    kept = 1.0 / max(1, k) if top_p is None else 0.5
    unit = {"top1": 1.0, "overlap": kept, "sampled": 1.0 / max(1, num_sampled)}
    ceilings = _ceilings(params)
    has_probabilities = any(quantity.name == "kl" for quantity in noise.quantities)
    if not has_probabilities:
        del ceilings["cosine"]
        unit["cosine"] = unit["sampled"]
    limits = {}
    for quantity in noise.quantities:
        errors = quantity.errors(noise.agreement)
        _, rows = noise.row_means(errors)
        unseen = 3.0 * unit.get(quantity.name, 0.0)
        floors = (
            float(errors.mean()) + unseen / len(noise),
            float(rows.max()) + unseen * len(rows) / len(noise),
        )
        mean, row = (max(factor * floor, quantity.resolution) for floor in floors)
        if quantity.likeness:
            mean, row = (min(m, (1.0 + f) / 2) for m, f in zip((mean, row), floors, strict=True))
        mean = min(mean, ceilings.get(quantity.name, mean))
        if quantity.name == "cosine" and has_probabilities:
            row = min(row, 1.0 - params.min_row_cosine)
        position = max(factor * tails * (float(errors.max()) + unseen), quantity.resolution)
        possible = position < 1.0 or not quantity.likeness
        limits[quantity.name] = Levels(
            mean=mean, worst_row=row, position=position if possible else None
        )
    worst = noise.row_means(noise.agreement.signed)[1].abs().amax(0)
    signed = [max(factor * float(value), NATS) for value in worst]
    return Limits(errors=limits, signed=dict(zip(noise.signed_names, signed, strict=True)))


def _ceilings(params: VerifyParams) -> dict[str, float]:
    """Return the ceilings for means over all positions."""
    return {
        "cosine": 1.0 - params.min_mean_cosine,
        "kl": params.max_mean_kl,
        "top1": 1.0 - params.min_top1,
        "overlap": 1.0 - params.min_overlap,
        "logprobs": params.max_logprob_error,
        "lse": params.max_lse_error,
        "lse_tau": params.max_normaliser_error,
        "entropy": params.max_normaliser_error,
        "entropy_gap": params.max_normaliser_error,
    }


def allowed_positions(size: int) -> int:
    """Return the number of positions that may exceed their limits."""
    return int(WRONG_SHARE * size)


def failures_of(cache: Compared, limits: Limits, places: Sequence[str]) -> list[str]:
    """Return a sentence for each quantity beyond a limit, and one for signed errors.

    NaN is beyond every limit.

    Args:
        places: the names of the rows examined.
    """
    found = [_failure(q, cache, limits.errors[q.name], places) for q in cache.quantities]
    means = cache.agreement.signed.double().mean(0).tolist()
    offsets = zip(cache.signed_names, means, limits.signed.values(), strict=True)
    wrong = [(abs(mean) / limit, name, mean, limit) for name, mean, limit in offsets]
    ratio, name, mean, limit = max(wrong, key=lambda item: (item[0] != item[0], item[0]))
    if not ratio <= 1.0:
        found.append(f"mean offset of {name} {mean:+.3g} is not within {limit:.3g}")
    return [sentence for sentence in found if sentence]


def _failure(
    quantity: Quantity, cache: Compared, limit: Levels, places: Sequence[str]
) -> str | None:
    errors = quantity.errors(cache.agreement)
    numbers, rows = cache.row_means(errors)
    mean, worst = float(errors.double().mean()), int(rows.argmax())
    if not mean <= limit.mean:
        return f"mean {_against(quantity, mean, limit.mean)}"
    if not float(rows[worst]) <= limit.worst_row:
        said = _against(quantity, float(rows[worst]), limit.worst_row)
        return f"in {places[numbers[worst]]} mean {said}"
    if limit.position is None:
        return None
    beyond, allowed = int((~(errors <= limit.position)).sum()), allowed_positions(len(errors))
    if beyond <= allowed:
        return None
    below = f"below {1.0 - limit.position:.6g}"
    bound = below if quantity.likeness else f"above {limit.position:.3g}"
    where = f"{beyond:,} of {len(errors):,} positions"
    return f"{quantity.words} is {bound} at {where}, more than {allowed}"


def _against(quantity: Quantity, error: float, limit: float) -> str:
    if quantity.likeness:
        return f"{quantity.words} {1.0 - error:.6f} is not >= {1.0 - limit:.6g}"
    return f"{quantity.words} {error:.3g} is not <= {limit:.3g}"


def smallest_found(
    noise: Compared, limits: Limits, rows: int
) -> tuple[dict[str, Levels], dict[str, float]]:
    """Return the smallest errors, and signed errors, that a check of `rows` rows detects at POWER.

    A constant error e under noise of mean 0 gives a mean |error| of at least e (Jensen's
    inequality). It is detected if it exceeds the limit by the amount by which correct values fall
    short of their mean in 1 of 20 cases: 1.645 standard errors, estimated from the spread between
    rows; at a position, the 95 % quantile.
    """
    z = NormalDist().inv_cdf(POWER)
    found = {}
    for quantity in noise.quantities:
        errors, limit = quantity.errors(noise.agreement), limits.errors[quantity.name]
        margin = z * float(_deviation(noise.row_means(errors)[1]))
        position = limit.position
        if position is not None:
            position += float(np.quantile(errors.numpy(), POWER))
        found[quantity.name] = Levels(
            mean=limit.mean + margin / sqrt(rows),
            worst_row=limit.worst_row + margin,
            position=position,
        )
    margins = z * _deviation(noise.row_means(noise.agreement.signed)[1]) / sqrt(rows)
    signed = zip(limits.signed.items(), margins.tolist(), strict=True)
    return found, {name: limit + margin for (name, limit), margin in signed}


def _deviation(rows: Tensor) -> Tensor:
    """Return the standard deviation over rows [rows, ...]; 0 for a single row."""
    return rows.std(0) if len(rows) > 1 else torch.zeros_like(rows[0])
