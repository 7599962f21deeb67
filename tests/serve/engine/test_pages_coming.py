"""Pages whose place adapters have still to leave: the sequence sits out, but not for ever."""

from __future__ import annotations

import pytest

from onebase.serve.engine.budget import PATIENCE
from onebase.serve.engine.memory import Bounds
from onebase.serve.engine.scheduler import Room

from .test_budget import SLOT, World


@pytest.fixture
def world() -> World:
    """Five adapters of six slots, every other one in use; a step moves one of them."""
    world = World(Bounds(8, 32, 64), Bounds(8, 32, 64))
    world.tier.device.placement.most_moved = 6 * SLOT
    assert all([world.tier.place(str(number), 6 * SLOT) for number in range(5)])  # noqa: C419
    world.tier.refer("1", "3")
    world.pass_steps(1)
    return world


def test_compaction_goes_on_without_an_eviction_more(world: World) -> None:
    answers = [world.budget.more_pages(12)]
    assert world.tier.evicted == ["0", "2"]
    while answers[-1] is not Room.NOW:
        assert answers[-1] is Room.SOON
        world.pass_steps(1)
        answers.append(world.budget.more_pages(12))
    assert 1 < len(answers) < 6
    assert world.tier.evicted == ["0", "2"]
    assert world.num_pages >= 44
    world.check()


def test_there_is_an_end_to_waiting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.tier.device.placement, "compact", lambda entries: False)
    answers = []
    for _ in range(PATIENCE + 1):
        answers.append(world.budget.more_pages(12))
        world.pass_steps(1)
    assert answers == [Room.SOON] * PATIENCE + [Room.NONE]
    world.pass_steps(1)
    assert world.budget.more_pages(12) is Room.SOON, "later it may be another matter"
