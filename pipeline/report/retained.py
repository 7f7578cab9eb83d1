"""The share of the teacher's probability that the stored ids hold, measured on the cache.

At temperature tau, the K ids of a position hold sum_k p_tau(k), which the stored normaliser makes
exact. A few shards suffice: a page must not read a terabyte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.packing import PADDING
from pipeline.logit_cache.reader import CacheReader

_SHARDS = 4
_ROWS_A_SHARD = 64
_QUANTILES = np.linspace(0.0, 1.0, 201)


@dataclass(frozen=True)
class MassAtTemperature:
    """Retained mass over positions, at one temperature."""

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
    positions: int
    shards: int
    all_shards: int

    @property
    def shares(self) -> NDArray[np.float64]:
        """Shares of positions, from 0 to 1, that the quantiles belong to."""
        return _QUANTILES


def measure_retained_mass(cache: CacheReader) -> RetainedMass | None:
    """Measure up to four evenly spread shards, 64 rows each; return None if only sampled ids are
    stored.

    Raises:
        MismatchError: a shard is damaged.
    """
    if not cache.fingerprint.k:
        return None
    chosen = _spread(cache.layout.num_shards, _SHARDS)
    masses: dict[float, list[NDArray[np.float32]]] = {}
    for number in chosen:
        shard = cache.shard(number)
        places = _spread(len(shard.rows), _ROWS_A_SHARD)
        topk = cache.gather([(shard, shard.first + place) for place in places])
        real = shard.rows.doc_ids[places] != PADDING
        for temperature in cache.fingerprint.temperatures:
            _, outside = topk.target(temperature)
            masses.setdefault(temperature, []).append(1.0 - outside.numpy()[real])
    joined = {temperature: np.concatenate(parts) for temperature, parts in masses.items()}
    return RetainedMass(
        temperatures=[
            MassAtTemperature(temperature, float(mass.mean()), np.quantile(mass, _QUANTILES))
            for temperature, mass in joined.items()
        ],
        positions=max((len(mass) for mass in joined.values()), default=0),
        shards=len(chosen),
        all_shards=cache.layout.num_shards,
    )


def _spread(size: int, wanted: int) -> list[int]:
    """Return up to `wanted` different, evenly spread numbers below `size`."""
    wanted = min(size, wanted)
    return [place * size // wanted for place in range(wanted)]
