"""Test whether sampled ids are a sample of the teacher's distribution, without comparing ids.

If two passes of a teacher agree to 1e-6, the sampled ids can be repeated and compared id by id. In
half formats the cumulative sums from which sampled ids are read differ by 1e-3, so that ids in the
tail differ too; in that case this test decides. It sums three quantities over all checked
positions. Their means and variances under the live distribution p are exact. An id v that was
sampled c_v times is v_j for c_v numbers j.

    surprise   sum_j log p(v_j) over the sampled ids of a position. A sample of p^b has mean
               E log p + (b - 1) Var log p to first order, and the sum is the sufficient statistic
               of b. This is the score test of b = 1 (Rao 1948), the most powerful one against ids
               drawn at another temperature 1 / b. Uniform ids, the most probable ids and the ids
               of another position also have another b.
    pairs      the number of equal pairs among the M sampled ids of a position, which is
               sum_v c_v (c_v - 1) / 2, with mean
               M (M - 1) / 2 sum_v p_v^2. If the next most probable ids replace the sampled ids,
               there are none; if one draw is repeated, there are all M (M - 1) / 2.
    place      sum_j F(v_j) - p(v_j) / 2 - 1/2, with F the cumulative sum of p by id: the mid-PIT,
               the probability integral transform of a discrete variable (Czado, Gneiting & Held
               2009, "Predictive Model Assessment for Count Data"), which has mean 0 under any p. If
               sampled ids of different positions are independent, the variance of its sum over a
               group of positions is the sum of the variances. If every position of a row uses the
               same random numbers, the squared sum over a row grows by a factor equal to the number
               of its positions; likewise the squared sum over all rows at one place, if every row
               uses the same numbers.

Pairs and squares are compared with a gamma variable of the same mean and variance, following
Satterthwaite 1946. The limits of each of the four tests are set at FALSE_ALARM, with an allowance
for the teacher's noise (NOISE_*).

Shapes: n positions, M sampled ids, D of them distinct, V valid vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import sqrt
from statistics import NormalDist

import torch
from torch import Tensor

from pipeline.verify.gate_report import FitTest
from pipeline.verify.power import POWER, chi2_quantile

FALSE_ALARM = 1e-6  # probability for each test, in caches without a fault
NOISE_TILT = 0.02  # effect that the teacher's noise may have on b
NOISE_RATIO = 1.25  # factor that it may have on the ratios of pairs and of squares


@dataclass(frozen=True, kw_only=True)
class SampleSums:
    """Sums over the sampled ids of each position, with their moments under p; float64 [n]."""

    surprise: Tensor  # minus its mean
    surprise_variance: Tensor
    pairs: Tensor
    pairs_mean: Tensor
    pairs_variance: Tensor
    place: Tensor
    place_variance: Tensor
    place_cumulant: Tensor  # the fourth cumulant
    impossible: Tensor  # sampled ids of probability 0, which are among the kept ids

    def map(self, function: Callable[[Tensor], Tensor]) -> SampleSums:
        """Apply a tensor function to every field."""
        return SampleSums(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    @staticmethod
    def cat(parts: list[SampleSums]) -> SampleSums:
        """Join along positions."""
        names = [field.name for field in fields(SampleSums)]
        return SampleSums(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})


def sample_sums(
    weights: Tensor, sampled_ids: Tensor, sampled_counts: Tensor, num_sampled: int
) -> SampleSums:
    """Compute the sums and moments of each position.

    Args:
        weights: float32 [n, V], proportional to p, 0 at ids that cannot be drawn. A position where
            all are 0 has nothing to draw from, and its sums are 0.
        sampled_ids: int64 [n, D], distinct where counts are not 0.
        sampled_counts: integer [n, D], 0 in empty slots.
        num_sampled: M, which the counts of a correct sample add up to.
    """
    values = 2**19 if weights.device.type == "cpu" else 2**24  # on a CPU, as many as fit its cache
    at_once = max(1, values // weights.shape[-1])
    parts = (torch.split(t, at_once) for t in (weights, sampled_ids, sampled_counts))
    pieces = zip(*parts, strict=True)
    return SampleSums.cat([_sample_sums(p, ids, c, num_sampled) for p, ids, c in pieces])


def _sample_sums(
    weights: Tensor, sampled_ids: Tensor, sampled_counts: Tensor, num_sampled: int
) -> SampleSums:
    total = weights.sum(-1, keepdim=True)
    some = total[:, 0] > 0
    p = weights / total.clamp_min(torch.finfo(torch.float32).tiny)
    log_p = torch.where(p > 0, p, 1.0).log_()
    work = p * log_p
    mean = work.sum(-1)
    variance = (work.mul_(log_p).sum(-1) - mean.square()).clamp_min(0.0)
    torch.mul(p, p, out=work)
    s2 = work.sum(-1).double()
    s3 = work.mul_(p).sum(-1).double()
    place = p.cumsum(-1).sub_(p, alpha=0.5).sub_(0.5)
    torch.mul(place, place, out=work)
    second = (p * work).sum(-1).double()
    fourth = (p * work.square_()).sum(-1).double()
    counts = sampled_counts.double()
    pairs = num_sampled * (num_sampled - 1) / 2
    sums = SampleSums(
        surprise=((log_p.gather(-1, sampled_ids) - mean[:, None]) * counts).sum(-1),
        surprise_variance=num_sampled * variance.double(),
        pairs=(counts * (counts - 1.0) / 2.0).sum(-1),
        pairs_mean=pairs * s2,
        pairs_variance=pairs * (s2 - s2.square() + 2 * (num_sampled - 2) * (s3 - s2.square())),
        place=(place.gather(-1, sampled_ids) * counts).sum(-1),
        place_variance=num_sampled * second,
        place_cumulant=num_sampled * (fourth - 3.0 * second.square()),
        impossible=((p.gather(-1, sampled_ids) == 0) * counts).sum(-1),
    )
    return sums.map(lambda values: torch.where(some, values, 0.0))


def sampled_overlap(ids: Tensor, counts: Tensor, other_ids: Tensor, other_counts: Tensor) -> Tensor:
    """Return the share of sampled ids that two samples have in common, float32 [n].

    An id counts as often as both have sampled it; the share is of the larger sample if the counts
    of one do not add up to M.

    Args:
        ids, other_ids: int64 [n, D], distinct where counts are not 0; D may differ.
        counts, other_counts: integer [n, D].
    """
    common = torch.minimum(counts, common_counts(ids, other_ids, other_counts)).sum(-1)
    return common / torch.maximum(counts.sum(-1), other_counts.sum(-1))


def common_counts(ids: Tensor, other_ids: Tensor, other_counts: Tensor) -> Tensor:
    """Return how often each of `ids` occurs in another sample, in the type of its counts; [n, D].

    Args:
        ids: int64 [n, D]; see `sampled_overlap`.
    """
    beyond = torch.iinfo(torch.int64).max
    by_id, order = other_ids.masked_fill(other_counts == 0, beyond).sort(-1)
    place = torch.searchsorted(by_id, ids.contiguous()).clamp_max(by_id.shape[-1] - 1)
    found = by_id.gather(-1, place) == ids
    return other_counts.gather(-1, order.gather(-1, place)) * found


def fit_tests(sums: SampleSums, rows: Tensor, columns: Tensor) -> list[FitTest]:
    """Run the tests over all positions; none if every position has only one id to draw.

    Args:
        rows: int64 [n], the row of each position.
        columns: int64 [n], the place of each position in its row.
    """
    variance = float(sums.surprise_variance.sum())
    if not variance:
        return []
    error = 1.0 / sqrt(variance)  # standard error of b
    limit = NOISE_TILT + NormalDist().inv_cdf(1.0 - FALSE_ALARM / 2) * error
    tilt = FitTest(
        name="inverse temperature",
        value=1.0 + float(sums.surprise.sum()) / variance,
        low=1.0 - limit,
        high=1.0 + limit,
        found=1.0 + limit + NormalDist().inv_cdf(POWER) * error,
    )
    pairs = _ratio("equal pairs", sums.pairs, sums.pairs_mean, sums.pairs_variance)
    by_row = _squares("spread over rows", sums, rows)
    return [tilt, *pairs, *by_row, *_squares("spread over places", sums, columns)]


def _squares(name: str, sums: SampleSums, group: Tensor) -> list[FitTest]:
    """Test whether sums over groups of positions vary as they do for independent sampled ids."""

    def of_groups(values: Tensor) -> Tensor:
        return values.new_zeros(int(group.max()) + 1).index_add_(0, group, values)

    variance = of_groups(sums.place_variance)
    of_square = of_groups(sums.place_cumulant) + 2.0 * variance.square()
    return _ratio(name, of_groups(sums.place).square(), variance, of_square)


def _ratio(name: str, observed: Tensor, expected: Tensor, variance: Tensor) -> list[FitTest]:
    """Test the sum of `observed` over its mean; a gamma variable of mean 1 gives the interval."""
    mean, spread = float(expected.sum()), float(variance.sum())
    if not mean or not spread:
        return []
    degrees = 2.0 * mean**2 / spread
    high = NOISE_RATIO * chi2_quantile(1.0 - FALSE_ALARM / 2, degrees) / degrees
    return [
        FitTest(
            name=name,
            value=float(observed.sum()) / mean,
            low=chi2_quantile(FALSE_ALARM / 2, degrees) / degrees / NOISE_RATIO,
            high=high,
            found=high * degrees / chi2_quantile(1.0 - POWER, degrees),
        )
    ]
