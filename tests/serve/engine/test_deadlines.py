"""Requests with a timeout: they fail when it is over, waiting or running, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onebase.serve.engine.deadlines import Deadlines
from onebase.serve.engine.messages import Request, SamplingParams


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_is_told_once_in_order_of_time() -> None:
    clock = Clock()
    deadlines = Deadlines(clock)
    for name, timeout in (("late", 3.0), ("early", 1.0), ("never", None), ("gone", 0.5)):
        deadlines.add(name, timeout)
    deadlines.remove("gone")
    deadlines.remove("never")
    assert deadlines.expired() == []
    clock.now += 5
    assert deadlines.expired() == ["early", "late"]
    assert deadlines.expired() == []


def test_an_id_that_is_used_again_has_its_own_time() -> None:
    clock = Clock()
    deadlines = Deadlines(clock)
    deadlines.add("a", 1.0)
    deadlines.remove("a")
    deadlines.add("a", 9.0)
    clock.now += 2
    assert deadlines.expired() == []
    clock.now += 8
    assert deadlines.expired() == ["a"]


def test_ended_requests_take_no_memory() -> None:
    deadlines = Deadlines(Clock())
    for number in range(5000):
        deadlines.add(f"r{number}", 1e9)
        deadlines.remove(f"r{number}")
    assert len(deadlines._heap) < 100
    assert not deadlines._due


def test_waiting_and_running_ones_fail_and_free_all(make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama", max_num_seqs=2)
    engine, clock = driver.engine, Clock()
    engine._deadlines = Deadlines(clock)
    sampling = SamplingParams(50, temperature=0.0, ignore_eos=True)
    for number in range(6):
        timeout = None if number in (1, 5) else 2.0
        driver._take(engine.add(Request(f"r{number}", (5, 6, 7, number), sampling, timeout=timeout)))
    for _ in range(4):
        driver.step()
    assert len(engine.scheduler.running) == 2
    assert not driver.failures
    clock.now += 3
    driver.step()
    assert sorted(driver.failures) == ["r0", "r2", "r3", "r4"]
    failure = driver.failures["r0"]
    assert (failure.kind, failure.param) == ("RequestTimedOut", "timeout")
    assert "2 s" in failure.message
    driver.run()
    assert {name: len(tokens) for name, tokens in driver.outputs.items() if name not in driver.failures} == {
        "r1": 50,
        "r5": 50,
    }
    assert engine.scheduler.pages.num_free == engine.scheduler.pages.num_pages
