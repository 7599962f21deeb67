"""The parts of a step add up, and the engine is as it was after they were timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from onebase.bench.overhead import PARTS, Clock, clocked, measure


def test_time_belongs_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(time, "thread_time", lambda: next(now))
    clock = Clock()
    with clock.counting("outer"):
        clock.wrap("inner", lambda: None)()
    assert clock.spent == {"outer": 1.0 + 4.0, "inner": 2.0}


def test_every_part_of_a_step_is_timed(make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama", max_model_len=40)
    expected = driver.generate([3, 4, 5], max_tokens=20)
    name = driver.submit([3, 4, 5], max_tokens=20)
    driver.step()
    with clocked(driver.engine, PARTS) as clock:
        driver.step()
    assert set(clock.spent) == {*PARTS, "forward"} - {"encode", "rest"}
    found = measure(driver.engine, 6)
    assert min(found[part] for part in ("forward", "stage", "overhead")) > 0
    assert set(found) == {*PARTS, "forward", "overhead"}
    driver.run()
    assert driver.outputs[name] == [expected[0], expected[1], *expected[8:]]
