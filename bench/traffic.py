"""S-LoRA's workload (Sheng et al., 2311.03285): which adapter, when, how long. Seeds make a run repeatable.

Adapter popularity is a power law: index = floor(n * u) with u from a power distribution of exponent alpha, so that
P(i) = ((i + 1) / n)^alpha - (i / n)^alpha; alpha 1 is uniform, smaller ones favour the first adapters. Gaps between
arrivals are gamma distributed with a coefficient of variation cv (1: Poisson). Lengths are uniform in [low, high).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. at: seconds since the start; adapter: index of it; tokens_in, tokens_out: its lengths."""

    at: float
    adapter: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """rate: requests a second; duration: seconds; lengths are [low, high)."""

    adapters: int
    alpha: float
    rate: float
    duration: float
    cv: float = 1.0
    tokens_in: tuple[int, int] = (96, 161)
    tokens_out: tuple[int, int] = (48, 81)
    seed: int = 0

    def arrivals(self) -> list[Arrival]:
        """rate * duration requests in order of time."""
        count = int(self.rate * self.duration)
        random = np.random.default_rng(self.seed)
        shape = 1 / self.cv**2
        at = np.cumsum(random.gamma(shape, self.cv**2 / self.rate, count))
        adapter = np.floor(self.adapters * random.power(self.alpha, count)).astype(int)
        tokens_in, tokens_out = (random.integers(*span, count) for span in (self.tokens_in, self.tokens_out))
        return [
            Arrival(float(t), int(a), int(i), int(o))
            for t, a, i, o in zip(at, adapter, tokens_in, tokens_out, strict=True)
        ]
