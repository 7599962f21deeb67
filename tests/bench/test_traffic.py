"""The workload generator against the closed form of its distributions, and the driver against a tiny engine."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from onebase.bench.traffic import Traffic


def shares(n: int, alpha: float) -> list[float]:
    """P(i) of the power law, from its definition."""
    return [((i + 1) / n) ** alpha - (i / n) ** alpha for i in range(n)]


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0])
def test_adapters_have_the_shares_of_the_power_law(alpha: float) -> None:
    drawn = Counter(a.adapter for a in Traffic(50, alpha, 100.0, 400.0).arrivals())
    total = sum(drawn.values())
    assert total == 40_000
    for index, share in enumerate(shares(50, alpha)):
        slack = 5 * math.sqrt(share * (1 - share) / total)
        assert abs(drawn[index] / total - share) < slack, f"adapter {index}"


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0])
def test_an_independent_generator_draws_alike(alpha: float) -> None:
    """Inverse transform with another library's numbers: u**(1 / alpha) has the power distribution."""
    other = random.Random(3)
    theirs = Counter(int(50 * other.random() ** (1 / alpha)) for _ in range(40_000))
    ours = Counter(a.adapter for a in Traffic(50, alpha, 100.0, 400.0, seed=3).arrivals())
    assert sum(abs(theirs[i] - ours[i]) for i in range(50)) / 40_000 < 0.06


@pytest.mark.parametrize("cv", [1.0, 2.0, 8.0])
def test_gaps_have_the_mean_and_the_variation_asked_for(cv: float) -> None:
    at = np.array([a.at for a in Traffic(4, 1.0, 20.0, 10_000.0, cv).arrivals()])
    gaps = np.diff(at)
    assert np.all(gaps >= 0)
    assert gaps.mean() == pytest.approx(1 / 20.0, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_lengths_fill_their_ranges_and_seeds_repeat() -> None:
    traffic = Traffic(4, 1.0, 50.0, 40.0, tokens_in=(3, 7), tokens_out=(1, 3), seed=9)
    arrivals = traffic.arrivals()
    assert {a.tokens_in for a in arrivals} == {3, 4, 5, 6}
    assert {a.tokens_out for a in arrivals} == {1, 2}
    assert arrivals == traffic.arrivals()
