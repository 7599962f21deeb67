"""Plans against independent draws of the same distributions."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest

from onebase.bench.load.prompts import Ids, Words
from onebase.bench.load.traces import TraceRequest
from onebase.bench.load.workload import Planned, Workload

MODELS = [f"a{index}" for index in range(50)]


def plan(**parameters: object) -> list[Planned]:
    return Workload(**parameters).plan(MODELS)  # type: ignore[arg-type]


def gaps(**parameters: object) -> np.ndarray:
    return np.diff([0.0, *(one.at or 0.0 for one in plan(rate=20.0, seconds=1000.0, **parameters))])


def shares(planned: list[Planned]) -> list[float]:
    drawn = Counter(one.model for one in planned)
    return [drawn[model] / len(planned) for model in MODELS]


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0])
def test_power_law_shares_are_those_of_another_generator(alpha: float) -> None:
    """By inverse transform: u ** (1 / alpha) has the power distribution. And the closed form."""
    count = 40_000
    ours = shares(plan(rate=40.0, seconds=1000.0, popularity=f"power:{alpha}"))
    other = random.Random(3)
    drawn = Counter(int(50 * other.random() ** (1 / alpha)) for _ in range(count))
    for index in range(50):
        share = ((index + 1) / 50) ** alpha - (index / 50) ** alpha
        slack = 5 * math.sqrt(share * (1 - share) / count)
        assert abs(ours[index] - share) < slack
        assert abs(drawn[index] / count - share) < slack


def test_zipf_shares_are_those_of_another_generator() -> None:
    weights = [(rank + 1) ** -1.2 for rank in range(50)]
    bounds = list(itertools.accumulate(weights))
    other = random.Random(5)
    drawn = Counter(bisect.bisect(bounds, other.random() * bounds[-1]) for _ in range(40_000))
    ours = shares(plan(rate=40.0, seconds=1000.0, popularity="zipf:1.2"))
    for index, weight in enumerate(weights):
        share = weight / bounds[-1]
        slack = 5 * math.sqrt(share * (1 - share) / 40_000)
        assert abs(ours[index] - share) < slack
        assert abs(drawn[index] / 40_000 - share) < slack


def test_the_draws_are_those_of_s_lora_for_the_same_seed() -> None:
    """Its benchmark seeds numpy's legacy generator, then draws adapters, prompts, answers and gaps in this order."""
    ours = plan(rate=5.0, seconds=60.0, seed=7, popularity="power:0.3", arrivals="gamma:2", tokens_in="8:512")
    legacy = np.random.RandomState(7)
    adapters = (legacy.power(0.3, 300) * 50).astype(int)
    tokens_in = legacy.randint(8, 512, 300)
    times = np.cumsum(legacy.gamma(1 / 4, 4 / 5.0, 300))
    assert [one.model for one in ours] == [MODELS[index] for index in adapters]
    assert [one.tokens_in for one in ours] == tokens_in.tolist()
    assert [one.at for one in ours] == pytest.approx(times.tolist())


@pytest.mark.parametrize("popularity", ["uniform", "distinct", "identical"])
def test_simple_popularities(popularity: str) -> None:
    drawn = Counter(one.model for one in plan(rate=10.0, seconds=500.0, popularity=popularity))
    if popularity == "identical":
        assert drawn == {"a0": 5000}
    elif popularity == "distinct":
        assert set(drawn.values()) == {100}
    else:
        assert all(50 < drawn[model] < 150 for model in MODELS)


@pytest.mark.parametrize("cv", [1.0, 2.0, 8.0])
def test_gamma_gaps_are_those_of_another_generator(cv: float) -> None:
    other = random.Random(1)
    theirs = np.array([other.gammavariate(1 / cv**2, cv**2 / 20.0) for _ in range(20_000)])
    for found in (gaps(arrivals=f"gamma:{cv}"), theirs):
        assert found.mean() == pytest.approx(1 / 20.0, rel=5 * cv / math.sqrt(20_000))
        assert found.std() / found.mean() == pytest.approx(cv, rel=0.15)


def test_poisson_gaps_are_exponential() -> None:
    found = gaps(arrivals="poisson")
    assert np.mean(found > math.log(2) / 20.0) == pytest.approx(0.5, abs=0.02)
    assert np.mean(found > math.log(20) / 20.0) == pytest.approx(0.05, abs=0.01)


def test_bursts_come_at_once_and_keep_the_rate() -> None:
    found = gaps(arrivals="bursts:8")
    assert np.all(found.reshape(-1, 8)[:, 1:] == 0)
    assert found.reshape(-1, 8)[:, 0].mean() == pytest.approx(8 / 20.0, rel=0.1)


def test_even_arrivals_have_one_gap() -> None:
    assert gaps(arrivals="even")[1:] == pytest.approx(1 / 20.0)


@pytest.mark.parametrize(("start", "rate"), [(0.0, 20.0), (5.0, 20.0), (20.0, 5.0), (7.0, 7.0)])
def test_ramps_have_the_rate_of_their_place(start: float, rate: float) -> None:
    at = np.array([one.at for one in plan(arrivals=f"ramp:{start}", rate=rate, seconds=1000.0)])
    assert np.all(np.diff(at) >= 0)
    assert len(at) == int((start + rate) / 2 * 1000)
    for left in range(0, 1000, 100):
        wanted = 100 * (start + (rate - start) * (left + 50) / 1000)
        assert abs(np.sum((left <= at) & (at < left + 100)) - wanted) < 5 * math.sqrt(wanted) + 1


def test_lengths_fill_their_ranges() -> None:
    planned = plan(rate=50.0, seconds=40.0, tokens_in="3:7", tokens_out="2")
    assert {one.tokens_in for one in planned} == {3, 4, 5, 6}
    assert {one.tokens_out for one in planned} == {2}


def test_lognormal_lengths_have_their_median_and_bound() -> None:
    lengths = [one.tokens_in for one in plan(rate=50.0, seconds=400.0, tokens_in="lognormal:100:0.8:1000")]
    assert np.median(lengths) == pytest.approx(100, rel=0.05)
    assert np.std(np.log([length for length in lengths if length < 1000])) == pytest.approx(0.8, rel=0.06)
    assert min(lengths) >= 1
    assert max(lengths) <= 1000


def test_seeds_repeat_and_differ() -> None:
    parameters = {"rate": 10.0, "seconds": 20.0, "cancel": 0.5, "popularity": "zipf:1.1", "shared_prefix": 3}
    assert plan(seed=1, **parameters) == plan(seed=1, **parameters)
    assert plan(seed=1, **parameters) != plan(seed=2, **parameters)


def test_a_share_is_cancelled_before_its_end() -> None:
    planned = plan(rate=100.0, seconds=50.0, cancel=0.2, tokens_out="1:33")
    cancelled = [one for one in planned if one.cancel_after is not None]
    assert len(cancelled) / len(planned) == pytest.approx(0.2, abs=0.03)
    assert all(1 <= (one.cancel_after or 0) <= max(1, one.tokens_out - 1) for one in cancelled)


def test_tenants_have_their_shares() -> None:
    planned = Workload(rate=100.0, seconds=50.0).plan(MODELS, shares=(3.0, 1.0))
    assert sum(one.tenant == 0 for one in planned) / len(planned) == pytest.approx(0.75, abs=0.03)


def test_closed_loops_have_no_times() -> None:
    planned = plan(clients=4, requests=9, seconds=None)
    assert [one.at for one in planned] == [None] * 9


def test_prompts_have_their_lengths_and_share_their_groups_prefix() -> None:
    planned = plan(rate=10.0, seconds=20.0, tokens_in="8:30", shared_prefix=16, prefix_groups=2)
    prompts = [Ids(1000, seed=3).of(one) for one in planned]
    assert [len(prompt) for prompt in prompts] == [one.tokens_in for one in planned]
    assert len({tuple(prompt[:7]) for prompt in prompts}) == 2
    assert len({tuple(prompt) for prompt in prompts}) > 150
    assert max(map(max, prompts)) < 1000
    words = [Words(seed=3).of(one) for one in planned]
    assert [len(text.split()) for text in words] == [one.tokens_in for one in planned]


def trace(*adapters: str | None) -> list[TraceRequest]:
    return [TraceRequest(float(i), name, 10 + i, 5, blocks=(1, 2)) for i, name in enumerate(adapters)]


def test_a_trace_gives_times_lengths_and_adapters() -> None:
    planned = Workload(seconds=2.5, speed=2.0).plan(["x", "y", "z"], trace=trace("q", "y", "q", None, "y", "q"))
    assert [one.at for one in planned] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [one.tokens_in for one in planned] == [10, 11, 12, 13, 14]
    assert [one.model for one in planned][:3] == ["x", "y", "x"]
    assert [(piece.seed, piece.tokens) for piece in planned[0].prefix] == [(1, 9)]


def test_a_trace_with_more_adapters_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="3 adapters, such as 'c'; the server has 2"):
        Workload().plan(["x", "y"], trace=trace("a", "b", "c"))


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"arrivals": "gamma"}, "gamma:CV"),
        ({"arrivals": "gamma:0"}, "CV must be above 0"),
        ({"arrivals": "gamma:nan"}, "not finite"),
        ({"arrivals": "bursts:1.5"}, "SIZE"),
        ({"popularity": "power:x"}, "power:ALPHA"),
        ({"popularity": "often"}, "zipf:S"),
        ({"tokens_in": "0"}, "tokens_in: .*TOKENS"),
        ({"tokens_out": "9:9"}, "tokens_out: .*HIGH"),
        ({"tokens_out": "lognormal:0:1:9"}, "MEDIAN"),
        ({"rate": 0.0}, "rate"),
        ({"cancel": 1.1}, "cancel"),
        ({"clients": 3}, "clients and requests"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_is_not_allowed_is_named(parameters: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plan(**parameters)
