"""Is a difference more than noise? Two tests, by what is at hand.

Requests of a load run: a bootstrap of the ratio of two statistics. Requests that follow each other share a queue, so
whole stretches of about sqrt(n) neighbours are drawn (a moving-block bootstrap, Kuensch 1989), not single requests. The
interval holds 99 % of the ratios, since a comparison asks for a dozen of them; a difference is beyond noise when the
interval leaves 1 out.

Rounds of a benchmark: the exact rank-sum test (Wilcoxon, Mann and Whitney) at 5 %, two-sided. Below four rounds a side
it can never say yes; then only ranges that lie apart are pointed out, as no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["higher", "lower", "no difference", "apart, higher", "apart, lower", "too few"]
Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # of rows of samples
_DRAWS, _CONFIDENCE, _LEVEL, _FEWEST = 1000, 0.99, 0.05, 8
_MOST_EXACT = 50_000  # ways to split the rounds; with more of them, so many are drawn


@dataclass(frozen=True, slots=True)
class Interval:
    """Of the ratio second / first."""

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        if self.low > 1:
            return "higher"
        return "lower" if self.high < 1 else "no difference"


def bootstrap(first: Sequence[float], second: Sequence[float], statistic: Statistic, seed: int = 0) -> Interval | None:
    """Both in order of time. None where a side has fewer than eight values, or nothing above zero."""
    if min(len(first), len(second)) < _FEWEST:
        return None
    random = np.random.default_rng(seed)
    one, other = (np.asarray(values, float) for values in (first, second))
    base, now = float(statistic(one[None])[0]), float(statistic(other[None])[0])
    if base <= 0:
        return None
    draws = min(_DRAWS, max(200, 8_000_000 // max(len(one), len(other))))  # long series take long
    below = np.maximum(_redrawn(one, draws, statistic, random), np.finfo(float).tiny)
    ratios = _redrawn(other, draws, statistic, random) / below
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(ratios, (tail, 100 - tail))
    return Interval(now / base, float(low), float(high))


def _redrawn(values: Floats, draws: int, statistic: Statistic, random: np.random.Generator) -> Floats:
    """The statistic of each draw; a part of them is in memory at a time."""
    part = max(1, 4_000_000 // len(values))
    sizes = [min(part, draws - done) for done in range(0, draws, part)]
    return np.concatenate([statistic(_resampled(values, size, random)) for size in sizes])


def _resampled(values: Floats, draws: int, random: np.random.Generator) -> Floats:
    """[draws, n]: stretches of neighbours, around the end if need be."""
    count = len(values)
    block = math.isqrt(count)
    starts = random.integers(0, count, (draws, -(-count // block), 1))
    places = (starts + np.arange(block)) % count
    drawn: Floats = values[places.reshape(draws, -1)[:, :count]]
    return drawn


def percentile(percent: float) -> Statistic:
    return lambda rows: np.asarray(np.percentile(rows, percent, axis=1), float)


def mean(rows: Floats) -> Floats:
    return np.asarray(rows.mean(axis=1), float)


def rounds(first: Sequence[float], second: Sequence[float]) -> Verdict:
    """Of second beside first."""
    if min(len(first), len(second)) < 2:
        return "too few"
    up = float(np.median(second)) > float(np.median(first))
    if _smallest_p(len(first), len(second)) > _LEVEL:
        apart = min(second) > max(first) or max(second) < min(first)
        return "no difference" if not apart else ("apart, higher" if up else "apart, lower")
    if rank_sum_p(first, second) > _LEVEL:
        return "no difference"
    return "higher" if up else "lower"


def _smallest_p(first: int, second: int) -> float:
    return 2 / math.comb(first + second, first)


def rank_sum_p(first: Sequence[float], second: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of the rank sum: over all splits of the ranks, or over many of them drawn at random."""
    values = np.array([*first, *second], float)
    ranks = _ranks(values)
    size, centre = len(first), len(first) * float(ranks.mean())
    if math.comb(len(values), size) <= _MOST_EXACT:
        sums = np.array([ranks[list(places)].sum() for places in combinations(range(len(values)), size)])
    else:
        random = np.random.default_rng(seed)
        sums = np.array([random.permutation(ranks)[:size].sum() for _ in range(_MOST_EXACT // 5)])
    seen = abs(float(ranks[:size].sum()) - centre)
    return float(np.mean(np.abs(sums - centre) >= seen - 1e-9))


def _ranks(values: Floats) -> Floats:
    """From 1; equal values share their mean rank."""
    below = (values[None] < values[:, None]).sum(axis=1)
    same = (values[None] == values[:, None]).sum(axis=1)
    return np.asarray(below + (same + 1) / 2, float)
