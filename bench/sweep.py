"""The highest rate, or number of adapters, at which a server keeps its promises: doubling, bisection, a check.

A point holds when its attainment is at least the target. The search knows nothing of servers: it asks a function. What
it ends with has held twice, with different seeds; where the second time fails, the point has failed.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

Measure = Callable[[float, int], Awaitable[float]]  # (value, seed) -> attainment, 0 to 1


@dataclass(frozen=True, slots=True)
class Range:
    """start: the first value tried. most: never beyond. step: neighbours are not told apart below this ratio. whole:
    values are whole numbers."""

    start: float
    most: float
    step: float = 1.1
    whole: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.start <= self.most:
            raise ValueError("start and most: 0 < start <= most")
        if not self.step > 1:
            raise ValueError("step: above 1")
        if self.whole and self.start < 1:
            raise ValueError("start: at least 1")

    def middle(self, low: float, high: float) -> float | None:
        """Between both, by ratio; none where they are neighbours."""
        value = math.sqrt(low * high)
        if self.whole:
            value = float(round(value))
        return value if low < value < high and high / low > self.step else None


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement."""

    value: float
    seed: int
    attainment: float


@dataclass(slots=True)
class Search:
    """target: the attainment that a value must have. points: what was measured, in order of time."""

    measure: Measure
    target: float
    range: Range
    points: list[Point] = field(default_factory=list)

    async def run(self) -> float | None:
        """The highest value that holds, confirmed; None where even the smallest tried does not."""
        low, high = await self._bracket()
        while low is not None:
            low = await self._bisected(low, high)
            if await self._holds(low):
                return low
            high, low = low, await self._lower(low)
        return None

    async def _bracket(self) -> tuple[float | None, float]:
        """(a value that holds, one that does not): double until it fails, or halve until it holds."""
        value = self.range.start
        if not await self._holds(value):
            return await self._lower(value), value
        while value < self.range.most:
            following = min(2 * value, self.range.most)
            if not await self._holds(following):
                return value, following
            value = following
        return value, math.inf

    async def _lower(self, failed: float) -> float | None:
        """The next value below that holds: one that has already, and has not failed since; else by halving."""
        known = [value for value in {point.value for point in self.points} if value < failed and self._held(value)]
        if known:
            return max(known)
        for _ in range(6):
            failed = max(1.0, float(round(failed / 2))) if self.range.whole else failed / 2
            if not any(point.value == failed for point in self.points) and await self._holds(failed):
                return failed
        return None

    async def _bisected(self, low: float, high: float) -> float:
        while high < math.inf and (middle := self.range.middle(low, high)) is not None:
            if await self._holds(middle):
                low = middle
            else:
                high = middle
        return low

    async def _holds(self, value: float) -> bool:
        """Measured with a seed that this value has not had."""
        seed = sum(point.value == value for point in self.points)
        attainment = await self.measure(value, seed)
        self.points.append(Point(value, seed, attainment))
        return attainment >= self.target

    def _held(self, value: float) -> bool:
        return all(point.attainment >= self.target for point in self.points if point.value == value)
