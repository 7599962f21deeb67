"""What the waiting room and the plan of turns cost, and what they take of host memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from onebase.serve.engine.messages import SetPins

from .test_tiers import BLOCK, KIB, Crowd, _ops


@pytest.fixture
def crowd_of(make_driver: Callable[..., Any]) -> Callable[..., Crowd]:
    """crowd_of(adapters, room on the device, room in host memory, **options)."""

    def make(count: int, room: int, host: int = 0, **options: Any) -> Crowd:
        sizes = {"adapter_memory": (room * BLOCK + 512) / (1 << 30), "host_cache": host * 4.5 * KIB}
        return Crowd(make_driver("llama", **(sizes | {"max_num_seqs": 2} | options)), count)

    return make


def test_who_waits_costs_nothing_where_nothing_changed(
    crowd_of: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds wait, a dozen adapters are pinned: a step looks at the first four of them, and at no others."""
    crowd = crowd_of(16, room=16, host=16)
    crowd.engine.set_pins(SetPins(tuple(map(crowd.use, crowd.names[:12]))))
    crowd.wait(lambda: len(crowd.engine.stats().pinned) == 12)
    for name in crowd.names:
        crowd.say(name)
    for turn in range(400):
        crowd.ask(crowd.names[turn % 16], max_tokens=100)
    crowd.wait(lambda: len(crowd.engine.scheduler.running) == 2)
    assert all(sequence.layout is not None for sequence in crowd.engine.scheduler.waiting)
    calls: Counter[str] = Counter()
    room = crowd.engine.waiting
    for owner, name in (
        (crowd.cache, "traits"),
        (room, "_together"),
        (room, "_lay_out"),
    ):
        original = getattr(owner, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(owner, name, counted)
    for _ in range(3):
        crowd.driver.step()
    assert calls["_lay_out"] == calls["traits"] == 0
    assert calls["_together"] <= 3 * 10


def test_new_pins_are_held_against_all_that_wait(crowd_of: Callable[..., Crowd]) -> None:
    """Also against who runs meanwhile, once it has been preempted."""
    crowd = crowd_of(3, room=4, host=8, max_num_seqs=1)
    crowd.add("big", _ops(99, rank=17))
    running, waiting = (crowd.ask("big", max_tokens=200) for _ in range(2))
    crowd.wait(lambda: len(crowd.driver.outputs.get(running, [])) > 1)
    crowd.driver.step()
    crowd.engine.set_pins(SetPins(tuple(map(crowd.use, crowd.names))))
    crowd.wait(lambda: waiting in crowd.driver.failures)
    assert crowd.driver.failures[waiting].kind == "AdapterTooLarge"
    assert running not in crowd.driver.failures
    crowd.engine.scheduler._preempt(crowd.engine.scheduler.running[0], crowd.engine._release)
    crowd.driver.step()
    assert crowd.driver.failures[running].kind == "AdapterTooLarge"
    assert crowd.engine.waiting._over == {}
    assert crowd.engine.waiting._new == {}


@pytest.mark.parametrize("room", [8, 15])
def test_packed_programs_stay_within_host_memory(room: int, crowd_of: Callable[..., Crowd]) -> None:
    """Those that wait for their place on the device, outside the tier, are charged to it as well. Compilations that are
    started before sizes are known may be too many, and are dropped once they are known."""
    crowd = crowd_of(40, room=room, host=10, max_num_seqs=24)
    for name in crowd.names[:room]:
        crowd.ask(name, max_tokens=200)
    crowd.wait(lambda: len(crowd.engine.scheduler.running) == room)
    for name in crowd.names[room:]:
        crowd.ask(name, max_tokens=2)
    host, most = crowd.cache.host, 0
    for _ in range(150):
        crowd.driver.step()
        packed = [entry.packed for entry in crowd.cache.transit.entries.values() if entry.digest not in host]
        outside = sum(one.nbytes for one in packed if one is not None)
        most = max(most, host.used + outside)
        time.sleep(0.001)
    assert len(host) >= 8, "the next turn's are there"
    assert most <= host.capacity
    crowd.driver.run()
    assert len(crowd.driver.outputs) == 40
