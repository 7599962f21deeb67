"""Pins that could not be loaded: when they are tried again."""

from __future__ import annotations

import pytest

from onebase.adapters.errors import AdapterRejected, EngineError, StorageFailed
from onebase.adapters.tiers.pins import Pins


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pins(clock: Clock) -> Pins:
    made = Pins(clock)
    made.replace({"a": "/a", "b": "/b"})
    return made


def _tried(pins: Pins) -> set[str]:
    return set(pins.within(1000)[0])


def test_what_may_pass_is_tried_again_after_longer_and_longer(pins: Pins, clock: Clock) -> None:
    waits = []
    for error in [StorageFailed("the disk"), EngineError("no memory")] * 6:
        pins.fail("a", error)
        assert _tried(pins) == {"b"}
        wait = pins.retry_in
        assert wait is not None
        waits.append(wait)
        clock.now += wait
        assert _tried(pins) == {"a", "b"}
        assert pins.retry_in == 0
    assert waits[:4] == [1, 2, 4, 8]
    assert waits[-2:] == [300, 300]


def test_once_it_arrived_the_waits_begin_anew(pins: Pins, clock: Clock) -> None:
    for _ in range(3):
        pins.fail("a", StorageFailed("the disk"))
    pins.arrive("a")
    assert pins.retry_in is None
    pins.fail("a", StorageFailed("the disk"))
    assert pins.retry_in == 1


def test_what_lies_in_the_files_is_not_tried_again_before_the_pins_change(pins: Pins, clock: Clock) -> None:
    pins.fail("a", AdapterRejected("it is no adapter"))
    clock.now += 1e9
    assert _tried(pins) == {"b"}
    assert pins.retry_in is None
    pins.replace(pins.paths)
    assert _tried(pins) == {"a", "b"}


def test_what_is_not_pinned_is_not_remembered(pins: Pins) -> None:
    pins.fail("c", StorageFailed("the disk"))
    assert pins.retry_in is None
