"""The share of the teacher's probability that the stored ids hold, measured on the cache.

At temperature tau, the kept ids of a position hold sum_k p_tau(k), which the stored normaliser
makes exact. It is a mean over the positions with a target. A few shards suffice: a page must not
read a terabyte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.logit_cache.reader import CacheReader

_SHARDS = 4
_ROWS_A_SHARD = 64
_QUANTILES = np.linspace(0.0, 1.0, 201)


@dataclass(frozen=True)
class MassAtTemperature:
    """Retained mass over positions with a target, at one temperature."""

    temperature: float
    mean: float
    quantiles: NDArray[np.float64]  # [201], one for each share of positions in `shares`

    def quantile(self, share: float) -> float:
        """Return the mass that this share of the positions does not exceed."""
        return float(np.interp(share, _QUANTILES, self.quantiles))


@dataclass(frozen=True)
class RetainedMass:
    """Retained mass at each stored temperature, and the part of the cache it was measured on."""

    temperatures: list[MassAtTemperature]
    positions: int  # with a target, on which it was measured
    share: float  # of all positions that were read, those with a target
    num_ids: float  # mean number of ids kept at these
    shards: int
    all_shards: int

    @property
    def shares(self) -> NDArray[np.float64]:
        """Shares of positions, from 0 to 1, that the quantiles belong to."""
        return _QUANTILES


def measure_retained_mass(cache: CacheReader) -> RetainedMass | None:
    """Measure up to four evenly spread shards, 64 rows each; return None if no id is kept there,
    as with sampled ids alone.

    Raises:
        MismatchError: a shard is damaged.
    """
    if not cache.fingerprint.k:
        return None
    chosen = _spread(cache.layout.num_shards, _SHARDS)
    temperatures = sorted({1.0, *cache.fingerprint.temperatures})
    masses: dict[float, list[NDArray[Any]]] = {tau: [] for tau in temperatures}
    num_read = num_ids = 0
    for number in chosen:
        shard = cache.shard(number)
        places = _spread(len(shard.rows), _ROWS_A_SHARD)
        topk = cache.gather([(shard, shard.first + place) for place in places])
        num_read += topk.lse.numel()
        topk = topk[topk.has_target]
        num_ids += int(topk.is_kept.sum())
        for temperature, parts in masses.items():
            _, outside = topk.target(temperature)
            parts.append(1.0 - outside.numpy())
    joined = {temperature: np.concatenate(parts) for temperature, parts in masses.items()}
    positions = len(joined[1.0])
    if not positions:
        return None
    return RetainedMass(
        temperatures=[
            MassAtTemperature(temperature, float(mass.mean()), np.quantile(mass, _QUANTILES))
            for temperature, mass in joined.items()
        ],
        positions=positions,
        share=positions / num_read,
        num_ids=num_ids / positions,
        shards=len(chosen),
        all_shards=cache.layout.num_shards,
    )


def _spread(size: int, wanted: int) -> list[int]:
    """Return up to `wanted` different, evenly spread numbers below `size`."""
    wanted = min(size, wanted)
    return [place * size // wanted for place in range(wanted)]
