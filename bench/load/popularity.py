"""Which adapter a request is for. Draws are numpy's legacy generator's: see arrivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from onebase.bench.load.spec import parse, positive


class Popularity(Protocol):
    def draw(self, random: RandomState, adapters: int, count: int) -> NDArray[np.int64]:
        """Indices below ``adapters``, of ``count`` requests."""


@dataclass(frozen=True, slots=True)
class Power:
    """S-LoRA's (2311.03285): floor(n * u), u of a power distribution, so P(i) = ((i + 1) / n)^alpha - (i / n)^alpha."""

    alpha: float

    def __post_init__(self) -> None:
        positive("ALPHA", self.alpha)

    def draw(self, random: RandomState, adapters: int, count: int) -> NDArray[np.int64]:
        return np.minimum((random.power(self.alpha, count) * adapters).astype(np.int64), adapters - 1)


@dataclass(frozen=True, slots=True)
class Zipf:
    """P(i) proportional to (i + 1)^-s over the adapters there are."""

    s: float

    def __post_init__(self) -> None:
        positive("S", self.s)

    def draw(self, random: RandomState, adapters: int, count: int) -> NDArray[np.int64]:
        weights = np.arange(1, adapters + 1, dtype=np.float64) ** -self.s
        bounds = np.cumsum(weights) / weights.sum()
        return np.minimum(np.searchsorted(bounds, random.random_sample(count), side="right"), adapters - 1)


@dataclass(frozen=True, slots=True)
class Uniform:
    """All alike."""

    def draw(self, random: RandomState, adapters: int, count: int) -> NDArray[np.int64]:
        return random.randint(0, adapters, count).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Distinct:
    """One after the other, so that as many as can be differ at any time."""

    def draw(self, random: RandomState, adapters: int, count: int) -> NDArray[np.int64]:
        return np.arange(count) % adapters


@dataclass(frozen=True, slots=True)
class Identical:
    """The first one, always."""

    def draw(self, random: RandomState, adapters: int, count: int) -> NDArray[np.int64]:
        return np.zeros(count, np.int64)


def parse_popularity(text: str) -> Popularity:
    """Raises ValueError with the forms allowed."""
    choices: dict[str, Callable[..., Popularity]] = {
        "power:ALPHA": Power,
        "zipf:S": Zipf,
        "uniform": Uniform,
        "distinct": Distinct,
        "identical": Identical,
    }
    return parse("popularity", text, choices)
