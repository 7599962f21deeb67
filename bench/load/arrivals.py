"""When requests come. Draws are numpy's legacy generator's, as in S-LoRA's benchmark: a seed gives its very times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from onebase.bench.load.spec import parse, positive


class Arrivals(Protocol):
    def count(self, rate: float, seconds: float) -> int:
        """How many: mean rate * seconds, cut to a whole number."""

    def times(self, random: RandomState, rate: float, seconds: float) -> NDArray[np.float64]:
        """So many, ascending, in seconds since the start. The last may come a little later than ``seconds``."""


class _OfRate:
    """The mean rate is the one asked for."""

    __slots__ = ()

    def count(self, rate: float, seconds: float) -> int:
        return int(rate * seconds)


@dataclass(frozen=True, slots=True)
class Gamma(_OfRate):
    """Gaps of a gamma distribution with mean 1 / rate; cv is their coefficient of variation, 1 a Poisson process."""

    cv: float = 1.0

    def __post_init__(self) -> None:
        positive("CV", self.cv)

    def times(self, random: RandomState, rate: float, seconds: float) -> NDArray[np.float64]:
        square = self.cv * self.cv
        return np.cumsum(random.gamma(1 / square, square / rate, self.count(rate, seconds)))


@dataclass(frozen=True, slots=True)
class Even(_OfRate):
    """Gaps of 1 / rate."""

    def times(self, random: RandomState, rate: float, seconds: float) -> NDArray[np.float64]:
        return np.arange(self.count(rate, seconds)) / rate


@dataclass(frozen=True, slots=True)
class Bursts(_OfRate):
    """``size`` requests at once, at the times of a Poisson process of rate / size."""

    size: float

    def __post_init__(self) -> None:
        if self.size < 1 or self.size != int(self.size):
            raise ValueError("SIZE must be a whole number above 0")

    def times(self, random: RandomState, rate: float, seconds: float) -> NDArray[np.float64]:
        count = self.count(rate, seconds)
        gaps = random.exponential(self.size / rate, -(-count // int(self.size)))
        return np.repeat(np.cumsum(gaps), int(self.size))[:count]


@dataclass(frozen=True, slots=True)
class Ramp:
    """A Poisson process whose rate grows (or falls) evenly from ``start`` to the rate asked for."""

    start: float

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError("FROM must be at least 0")

    def count(self, rate: float, seconds: float) -> int:
        return int((self.start + rate) / 2 * seconds)

    def times(self, random: RandomState, rate: float, seconds: float) -> NDArray[np.float64]:
        """Given how many they are, arrivals of a Poisson process are independent draws of its rate, sorted.

        Their distribution function (2 a t + (b - a) t^2 / T) / ((a + b) T) is inverted.
        """
        a, b = self.start, rate
        share = np.sort(random.random_sample(self.count(rate, seconds)))
        return seconds * share * (a + b) / (a + np.sqrt(a * a + (b * b - a * a) * share) + 1e-300)


def parse_arrivals(text: str) -> Arrivals:
    """Raises ValueError with the forms allowed."""
    choices: dict[str, Callable[..., Arrivals]] = {
        "poisson": Gamma,
        "gamma:CV": Gamma,
        "even": Even,
        "bursts:SIZE": Bursts,
        "ramp:FROM": Ramp,
    }
    return parse("arrivals", text, choices)
