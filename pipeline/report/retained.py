"""How much of the teacher's probability the stored ids hold, measured on the cache itself.

At temperature tau a position's K ids hold sum_k p_tau(k), exact by the stored normaliser. A few
shards tell: a page must not read a terabyte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.packing import PADDING
from pipeline.store.reader import CacheReader

_SHARDS = 4
_ROWS_A_SHARD = 64
_QUANTILES = np.linspace(0.0, 1.0, 201)


@dataclass(frozen=True)
class MassAtTemperature:
    """Retained mass over positions, at one temperature."""

    temperature: float
    mean: float
    quantiles: NDArray[np.float64]  # [201], of the shares of positions in `shares`

    def quantile(self, share: float) -> float:
        """The mass that this share of the positions does not exceed."""
        return float(np.interp(share, _QUANTILES, self.quantiles))


@dataclass(frozen=True)
class RetainedMass:
    """Retained mass at each stored temperature, and of how much of the cache."""

    temperatures: list[MassAtTemperature]
    positions: int
    shards: int
    all_shards: int

    @property
    def shares(self) -> NDArray[np.float64]:
        """Shares of positions, 0 to 1, at which the quantiles stand."""
        return _QUANTILES


def measure_retained_mass(cache: CacheReader) -> RetainedMass | None:
    """Of up to four shards, spread evenly, 64 rows each; None where the cache keeps draws alone.

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
    """Up to `wanted` different places below `size`, evenly."""
    wanted = min(size, wanted)
    return [place * size // wanted for place in range(wanted)]
