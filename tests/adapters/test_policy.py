"""Who is evicted: the book of scores against the definition, and what it keeps under the loads of the literature."""

from __future__ import annotations

import itertools
import math
import random
from collections import OrderedDict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.adapters.tiers.policy import Lrfu

KEYS = "abcdef"


def _defined(uses: Sequence[str], key: str, half_life: float) -> float:
    """The recency-weighted frequency now, by its definition."""
    now = len(uses)
    return math.fsum(2.0 ** ((at - now) / half_life) for at, one in enumerate(uses, 1) if one == key)


@settings(deadline=None)
@given(uses=st.lists(st.sampled_from(KEYS), min_size=1, max_size=60), half_life=st.sampled_from([0.5, 3.0, 500.0]))
def test_scores_are_what_the_definition_says(uses: list[str], half_life: float) -> None:
    policy = Lrfu(half_life)
    for key in uses:
        policy.use(key)
    for key in set(uses):
        score = 2.0 ** (policy._score(key) - len(uses) / half_life)
        assert score == pytest.approx(_defined(uses, key, half_life), rel=1e-9)
    coldest = policy.coldest(sorted(set(uses)))
    assert coldest is not None
    least = min(_defined(uses, key, half_life) for key in set(uses))
    assert _defined(uses, coldest, half_life) == pytest.approx(least, rel=1e-9)


def test_a_short_half_life_is_lru_and_a_long_one_counts() -> None:
    for half_life, expected in ((0.01, "a"), (1e9, "b")):
        policy = Lrfu(half_life)
        for key in "aaab":
            policy.use(key)
        assert policy.coldest("ab") == expected


def test_who_came_unused_counts_once_and_the_forgotten_nothing() -> None:
    policy = Lrfu()
    policy.use("a")
    policy.know("b")
    policy.know("a")
    assert policy.coldest("ab") == "a"
    policy.forget("b")
    assert policy.coldest("ab") == "b"
    assert len(policy) == 1
    assert policy.coldest("") is None


def test_scores_stay_finite_over_a_long_life() -> None:
    policy = Lrfu(half_life=1.0)
    policy.use("old")
    policy._uses = 10**9
    policy.use("old")
    policy.use("new")
    assert math.isfinite(policy._score("old"))
    assert policy.coldest(["old", "new"]) == "old"


def _power(alpha: float) -> list[float]:
    """S-LoRA's popularity of 300 adapters."""
    return [((i + 1) / 300) ** alpha - (i / 300) ** alpha for i in range(300)]


ZIPF = [1 / (i + 1) ** 1.2 for i in range(300)]


def _lru_hits(uses: Sequence[int], room: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for key in uses:
        hits += key in held
        held[key] = None
        held.move_to_end(key)
        if len(held) > room:
            held.popitem(last=False)
    return hits


def _lrfu_hits(uses: Sequence[int], room: int) -> int:
    policy, held, hits = Lrfu(half_life=150), set[str](), 0  # as 500 is to a thousand adapters
    for use in uses:
        key = str(use)
        policy.use(key)
        hits += key in held
        if key not in held and len(held) == room:
            gone = policy.coldest(held)
            assert gone is not None
            held.remove(gone)
            policy.forget(gone)
        held.add(key)
    return hits


@pytest.mark.parametrize(
    ("weights", "least"), [(_power(0.3), 1.1), (_power(1.0), 0.9), (ZIPF, 1.02)], ids=["alpha 0.3", "alpha 1", "zipf"]
)
def test_it_keeps_more_hits_than_lru(weights: list[float], least: float) -> None:
    uses = random.Random(1).choices(range(300), weights, k=6000)
    assert _lrfu_hits(uses, 30) >= least * _lru_hits(uses, 30)


def test_a_scan_of_cold_adapters_does_not_flush_the_hot_ones() -> None:
    hot = random.Random(2).choices(range(300), ZIPF, k=3000)
    uses = [key for at, use in enumerate(hot) for key in ((use,) if at % 300 else (use, *range(1000 + at, 1060 + at)))]
    assert _lrfu_hits(uses, 30) >= 1.05 * _lru_hits(uses, 30)


@settings(deadline=None)
@given(uses=st.lists(st.sampled_from(KEYS), max_size=30), stop=st.integers(0, len(KEYS)))
def test_the_order_of_going_is_that_of_the_coldest_one_after_the_other(uses: list[str], stop: int) -> None:
    policy, left = Lrfu(half_life=3.0), list(KEYS)
    for key in uses:
        policy.use(key)
    for gone in itertools.islice(policy.coldest_first(KEYS), stop):
        assert gone == policy.coldest(left)
        left.remove(gone)
    assert len(left) == len(KEYS) - stop
