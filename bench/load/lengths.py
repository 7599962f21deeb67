"""How many tokens prompts and answers have. Draws are numpy's legacy generator's: see arrivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from onebase.bench.load.spec import parse

MOST = 1 << 20


class Lengths(Protocol):
    def draw(self, random: RandomState, count: int) -> NDArray[np.int64]:
        """At least 1 each."""


@dataclass(frozen=True, slots=True)
class Fixed:
    tokens: float

    def __post_init__(self) -> None:
        _whole("TOKENS", self.tokens)

    def draw(self, random: RandomState, count: int) -> NDArray[np.int64]:
        return np.full(count, int(self.tokens))


@dataclass(frozen=True, slots=True)
class Between:
    """Uniform in [low, high), as S-LoRA has it."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _whole("LOW", self.low)
        _whole("HIGH", self.high)
        if self.low >= self.high:
            raise ValueError("HIGH must be above LOW; it is not reached itself")

    def draw(self, random: RandomState, count: int) -> NDArray[np.int64]:
        return random.randint(int(self.low), int(self.high), count).astype(np.int64)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp(N(ln median, sigma)), rounded, from 1 to ``most``: what is longer is ``most``."""

    median: float
    sigma: float
    most: float

    def __post_init__(self) -> None:
        _whole("MOST", self.most)
        if self.median < 1 or self.sigma < 0:
            raise ValueError("MEDIAN must be at least 1, SIGMA at least 0")

    def draw(self, random: RandomState, count: int) -> NDArray[np.int64]:
        drawn = np.rint(random.lognormal(np.log(self.median), self.sigma, count))
        return np.clip(drawn, 1, self.most).astype(np.int64)


def parse_lengths(what: str, text: str) -> Lengths:
    """``128``, ``8:512`` or ``lognormal:MEDIAN:SIGMA:MOST``. Raises ValueError with the forms allowed."""
    if text[:1].isdigit():
        text = f"uniform:{text}" if ":" in text else f"fixed:{text}"
    choices: dict[str, Callable[..., Lengths]] = {
        "fixed:TOKENS": Fixed,
        "uniform:LOW:HIGH": Between,
        "lognormal:MEDIAN:SIGMA:MOST": LogNormal,
    }
    return parse(what, text, choices)


def _whole(what: str, value: float) -> None:
    if not 1 <= value <= MOST or value != int(value):
        raise ValueError(f"{what} must be a whole number from 1 to {MOST}")
