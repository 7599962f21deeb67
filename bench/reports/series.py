"""Requests of a load run as series: tokens over time, requests in flight, distributions, adapters over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from onebase.bench.load.result import RequestRecord

Points = list[tuple[float, float]]
_MOST_POINTS = 300


def cdf(values: Iterable[float]) -> Points:
    """(value, share of all that are at most it), thinned to what a chart can show; the tail keeps its points."""
    ordered = np.sort(np.fromiter(values, float))
    count = len(ordered)
    if not count:
        return []
    ranks = np.unique(np.round(np.linspace(0, count - 1, min(count, _MOST_POINTS))).astype(int))
    return [(float(ordered[rank]), (int(rank) + 1) / count) for rank in ranks]


@dataclass(frozen=True, slots=True)
class Bins:
    """Equal stretches of a run, each of ``width`` seconds."""

    count: int
    width: float

    @classmethod
    def over(cls, seconds: float, most: int = 60) -> Bins:
        """Of at least a second, but for runs that are shorter than ten."""
        seconds = max(seconds, 1e-3)
        count = max(1, min(most, int(seconds) if seconds >= 10 else 10))
        return cls(count, seconds / count)

    def of(
        self, times: Sequence[float] | NDArray[np.float64], weights: Sequence[float] | None = None
    ) -> NDArray[np.float64]:
        """Sums by bin."""
        found, _ = np.histogram(np.asarray(times, float), self.count, (0.0, self.count * self.width), weights=weights)
        return found.astype(float)

    def points(self, values: NDArray[np.float64]) -> Points:
        """At the middle of each bin."""
        return [((place + 0.5) * self.width, float(value)) for place, value in enumerate(values)]

    def rate(self, times: Sequence[float], weights: Sequence[float] | None = None) -> Points:
        """A second."""
        return self.points(self.of(times, weights) / self.width)


def token_times(requests: Iterable[RequestRecord]) -> tuple[list[float], list[float]]:
    """(when each piece came, how many tokens it stands for)."""
    times, weights = list[float](), list[float]()
    for request in requests:
        if request.first is not None:
            pieces = list(accumulate(request.gaps, initial=request.first))
            times += pieces
            weights += [request.tokens_out / len(pieces)] * len(pieces)
    return times, weights


def in_flight(requests: Iterable[RequestRecord], end: float) -> Points:
    """How many requests the client had sent and not seen the end of. Each that failed counts until it was sent."""
    changes = Counter[float]()
    for request in requests:
        if request.ends is not None or request.status == "ok":
            changes[request.sent] += 1
            changes[end if request.ends is None else request.ends] -= 1
    points, now = [(0.0, 0.0)], 0
    for at in sorted(changes):
        now += changes[at]
        points.append((at, float(now)))
    return points[:: max(1, len(points) // 2000)]


def by_popularity(requests: Iterable[RequestRecord]) -> list[tuple[str, list[RequestRecord]]]:
    """(adapter, its requests), those with most requests first."""
    groups = dict[str, list[RequestRecord]]()
    for request in requests:
        groups.setdefault(request.adapter, []).append(request)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
