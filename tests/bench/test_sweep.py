"""The search for the highest value that holds."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.bench.sweep import Range, Search


def search(limit: float, span: Range) -> tuple[float | None, Search]:
    """Of a server that keeps its promises up to ``limit``."""

    async def measure(value: float, seed: int) -> float:
        assert value <= span.most
        assert not span.whole or value == int(value)
        return 1.0 if value <= limit else 0.5

    found = Search(measure, 0.9, span)
    return asyncio.run(found.run()), found


@settings(max_examples=200, deadline=None)
@given(limit=st.floats(0.05, 500), start=st.floats(0.5, 50), whole=st.booleans())
def test_what_is_found_holds_twice_and_lies_close_below_the_limit(limit: float, start: float, whole: bool) -> None:
    span = Range(float(math.ceil(start)) if whole else start, 200, 1.1, whole)
    value, done = search(limit, span)
    if value is None:
        assert limit < span.start / 30 or (whole and limit < 1)
        return
    assert value <= limit
    assert value == 200 or value * 1.1 >= limit * (1 - 1e-9) or (whole and value + 1 > limit)
    assert sum(point.value == value for point in done.points) >= 2
    assert len({(point.value, point.seed) for point in done.points}) == len(done.points)
    assert len(done.points) < 25


def test_a_value_that_held_by_luck_is_given_up() -> None:
    asked: list[float] = []

    async def measure(value: float, seed: int) -> float:
        asked.append(value)
        return 1.0 if value <= 4 or (value <= 8 and seed == 0) else 0.0

    done = Search(measure, 0.9, Range(1, 64, 1.2))
    value = asyncio.run(done.run())
    assert value is not None
    assert 4 / 1.2 <= value <= 4
    assert max(asked) > 8


def test_a_server_that_holds_nothing_ends_the_search() -> None:
    value, done = search(0.0, Range(8, 64))
    assert value is None
    assert len(done.points) == 7


def test_a_server_without_a_limit_is_asked_no_more_than_allowed() -> None:
    assert search(math.inf, Range(1, 10))[0] == 10


@pytest.mark.parametrize("arguments", [(0, 1), (2, 1), (1, 2, 1.0), (0.5, 2, 1.1, True)])
def test_ranges_without_sense_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"start|step"):
        Range(*arguments)  # type: ignore[arg-type]
