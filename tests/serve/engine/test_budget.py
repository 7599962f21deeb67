"""The border between adapters and KV pages: who gives what, to whom, and that it comes to rest.

The scheduler, its pages and the device tier are real; adapters are numbers, and nobody puts them into tables.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.adapters.packing import PackedProgram
from onebase.adapters.tiers.arena import Arena
from onebase.adapters.tiers.device import DeviceTier
from onebase.adapters.tiers.entry import Entry, State
from onebase.adapters.tiers.policy import Lrfu
from onebase.adapters.tiers.shared_blocks import SharedBlocks
from onebase.adapters.traits import Traits
from onebase.serve.engine.budget import CALM, SHARES, DeviceBudget
from onebase.serve.engine.memory import Bounds, MemoryPlan, allocate, arena_in
from onebase.serve.engine.messages import Request, SamplingParams
from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.prefix_cache import ROOT, Block, PrefixCache
from onebase.serve.engine.scheduler import Scheduler
from onebase.serve.engine.sequence import Sequence

SLOT = 1024
PAGE = 4


class NoTables:
    """In the place of the installer."""

    def install(self, entry: Entry) -> None:
        pass

    def uninstall(self, entry: Entry) -> None:
        pass


class Adapters:
    """Adapters by name on the real device tier: the first one is the coldest. Each is full of its own number."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.policy = Lrfu()
        installer: Any = NoTables()
        self.device = DeviceTier(arena, SharedBlocks(arena), installer, self.policy, evicted=self._evicted)
        self.entries: dict[str, Entry] = {}
        self.evicted: list[str] = []

    def place(self, name: str, nbytes: int, protected: Collection[str] = (), *, awaited: bool = True) -> bool:
        """As one step tries to; the copy is done at once."""
        packed = PackedProgram(name, "TEST", 0, 0, Traits(), torch.full((nbytes // 4,), float(name)), {}, {}, {})
        entry = Entry(name, "", State.COMPILING)
        entry.take(packed)
        found = self.device.place(entry, protected, awaited=awaited)
        if found is None:
            return False
        self.policy.use(name)
        self.arena.buffer[found.start : found.start + nbytes // 4] = packed.data
        self.entries[name], entry.state, entry.packed = entry, State.READY, None
        return True

    def refer(self, *names: str) -> None:
        for name in names:
            self.entries[name].references += 1

    def remove(self, *names: str) -> None:
        for name in names:
            self.device.drop(self.entries.pop(name))

    def _evicted(self, entry: Entry) -> None:
        del self.entries[entry.digest]
        self.evicted.append(entry.digest)

    def check(self) -> None:
        self.arena.check()
        assert {entry.digest for entry in self.device.entries} == self.entries.keys()
        for name, entry in self.entries.items():
            held = self.arena.buffer[entry.block : entry.block + entry.num_elements]
            assert (held == float(name)).all(), "an adapter was overwritten"


class World:
    """Both sides of a buffer. Each page holds a number of its own."""

    def __init__(self, pages: Bounds, adapters: Bounds, slots: int = 64) -> None:
        """adapters: in slots."""
        in_bytes = Bounds(*(count * SLOT for count in (adapters.least, adapters.start, adapters.most)))
        self.plan = MemoryPlan(pages, in_bytes, slots, SLOT, pages.least * PAGE)
        buffer = allocate(self.plan, torch.device("cpu"))
        self.rows = buffer.view(torch.float32).view(slots, -1)
        self.cache = PrefixCache()
        self.pages = PageAllocator(pages.start, PAGE, self.cache, self.plan.first_page)
        self.scheduler = Scheduler(self.pages, 64, 64)
        self.tier = Adapters(arena_in(buffer, self.plan, torch.float32))
        self.waiting = SimpleNamespace(wanted=set(), kept=set(), needed_bytes=0)
        stand_in: Any = SimpleNamespace(arena=self.tier.arena, device=self.tier.device)
        waiting: Any = self.waiting
        self.budget = DeviceBudget(self.plan, self.scheduler, stand_in, self._copy, waiting)
        self.held: dict[str, Sequence] = {}
        self.made = 0

    def _copy(self, moves: dict[int, int]) -> None:
        self.rows[list(moves.values())] = self.rows[list(moves)]

    @property
    def num_pages(self) -> int:
        return self.pages.num_pages

    @property
    def arena_slots(self) -> int:
        return self.tier.arena.capacity_bytes // SLOT

    def pass_steps(self, count: int = CALM) -> None:
        for _ in range(count):
            self.budget.step()
            self.tier.device.placement.begin_step()

    def grow(self, count: int, name: str = "") -> bool:
        """A running sequence takes pages; False where it would be preempted."""
        sequence = self.held.get(name) or self._start(name)
        if not self.scheduler._grow(sequence, (len(sequence.pages) + count) * PAGE):
            return False
        made = range(self.made, self.made + count)
        self.rows[sequence.pages[-count:]] = torch.tensor(made, dtype=torch.float32)[:, None]
        sequence.tokens.extend(made)
        self.made += count
        return True

    def _start(self, name: str) -> Sequence:
        sequence = Sequence.of(Request(name, (1,), SamplingParams(1)), len(self.held))
        sequence.tokens.clear()
        self.scheduler.running.append(sequence)
        self.held[name] = sequence
        return sequence

    def end(self, name: str = "", *, cached: bool = False) -> None:
        sequence = self.held.pop(name)
        for page, token in zip(sequence.pages, sequence.tokens, strict=True):
            if cached:
                self.cache.add(page, Block.of(ROOT, (token,), ()))
        self.pages.free(sequence.pages)
        self.scheduler.running.remove(sequence)

    def check(self) -> None:
        self.budget.check()
        self.tier.check()
        self.pages.check([sequence.pages for sequence in self.held.values()])
        for sequence in self.held.values():
            assert self.rows[sequence.pages, 0].tolist() == sequence.tokens, "a page was overwritten"
        for page, block in self.cache._blocks.items():
            assert self.rows[page, -1] == block.tokens[0], "a cached page was overwritten"


@pytest.fixture
def world() -> World:
    """32 pages and 32 slots of adapters, at least 8 each. A share is two slots."""
    return World(Bounds(8, 32, 64), Bounds(8, 32, 64))


def test_adapters_take_pages_that_hold_nothing_before_anybody_is_evicted(world: World) -> None:
    assert world.tier.place("1", 31 * SLOT)
    assert world.tier.place("2", 3 * SLOT)
    assert world.tier.evicted == []
    assert (world.arena_slots, world.num_pages) == (34, 30)
    world.check()


def test_pages_of_the_prefix_cache_go_only_when_no_adapter_can(world: World) -> None:
    assert world.grow(32)
    world.end(cached=True)
    world.pass_steps()
    assert world.tier.place("1", 32 * SLOT)
    assert world.tier.place("2", 4 * SLOT)
    assert world.tier.evicted == ["1"]
    world.tier.refer("2")
    assert world.tier.place("3", 32 * SLOT)
    assert world.arena_slots == 36
    assert world.cache.evictions == 4
    world.check()


def test_pages_that_are_held_move_out_of_the_way(world: World) -> None:
    for name in ("a", "b", "c"):
        assert world.grow(10, name)
    world.end("a")
    before = [list(sequence.pages) for sequence in world.held.values()]
    assert world.tier.place("1", 40 * SLOT)
    assert [list(sequence.pages) for sequence in world.held.values()] != before
    assert world.arena_slots == 40
    world.check()


def test_pages_keep_their_lower_bound_and_one_for_each_running_sequence(world: World) -> None:
    assert not world.tier.place("1", 57 * SLOT)
    assert world.num_pages >= world.plan.pages.least
    world = World(Bounds(8, 32, 64), Bounds(8, 32, 64))
    for name in ("a", "b", "c"):
        assert world.grow(8, name)
    assert not world.tier.place("1", 38 * SLOT)
    assert world.tier.place("2", 37 * SLOT)
    assert world.pages.num_free == 3
    world.check()


def test_pages_take_free_room_before_adapters_leave(world: World) -> None:
    assert world.tier.place("1", 8 * SLOT)
    assert world.tier.place("2", 12 * SLOT)
    world.tier.remove("1")
    assert world.grow(32 + 20)
    assert world.tier.evicted == []
    assert world.num_pages == 52
    assert world.grow(4)
    assert world.tier.evicted == ["2"]
    assert not world.grow(1), "adapters have their lower bound"
    world.check()


def test_adapters_in_use_or_waited_for_stay(world: World) -> None:
    for name in ("1", "2", "3"):
        assert world.tier.place(name, 10 * SLOT)
    world.tier.refer("1")
    world.waiting.kept.add("2")
    assert not world.grow(32 + 13)
    assert world.tier.evicted == [], "nobody leaves where that is not enough"
    assert world.grow(32 + 12)
    assert world.tier.evicted == ["3"]
    assert world.num_pages == 44
    world.check()


def test_it_moves_in_shares_so_that_growth_does_not_ask_at_each_step(world: World) -> None:
    assert world.grow(32)
    moves = [world.grow(1) and world.budget.moves for _ in range(4)]
    assert moves == [1, 1, 2, 2]
    assert world.num_pages == 32 + 2 * 64 // SHARES
    world.check()


def test_a_side_that_was_short_gives_nothing_for_a_while(world: World) -> None:
    assert world.grow(33)
    world.end()
    assert not world.tier.place("1", 32 * SLOT)
    world.pass_steps(CALM - 1)
    assert world.budget.spare_bytes == 0
    world.pass_steps(1)
    assert world.budget.spare_bytes == 26 * SLOT
    assert world.tier.place("1", 32 * SLOT)
    world.check()


def test_neither_side_gets_more_than_its_upper_bound() -> None:
    world = World(Bounds(8, 32, 40), Bounds(8, 32, 38))
    assert not world.tier.place("1", 39 * SLOT)
    assert world.tier.place("2", 38 * SLOT)
    assert (world.arena_slots, world.num_pages) == (38, 26)
    world.tier.remove("2")
    world.pass_steps()
    assert not world.grow(41)
    assert world.grow(40)
    world.check()


def test_where_both_are_short_the_split_stands(world: World) -> None:
    world.tier.place("1", 31 * SLOT)
    world.tier.refer("1")
    assert world.grow(31)
    for _ in range(5 * CALM):
        world.pass_steps(1)
        assert not world.tier.place("2", 8 * SLOT)
        assert not world.grow(2)
    assert world.budget.moves == 0
    world.pass_steps()
    assert world.grow(2), "adapters have not been short since"
    world.check()


def test_the_oldest_requests_adapters_get_their_room_whoever_is_short(world: World) -> None:
    """Else a stream of requests over the base could keep out an adapter that is larger than the arena is now."""
    assert world.grow(28)
    world.waiting.needed_bytes = 36 * SLOT
    placed = False
    for step in range(4):
        world.pass_steps(1)
        world.grow(9, "greedy")
        placed = placed or world.tier.place("1", 36 * SLOT)
        if step == 1:
            world.end()
    assert placed
    world.check()


def test_they_get_it_bit_by_bit_as_pages_become_free() -> None:
    world = World(Bounds(8, 64, 128), Bounds(8, 64, 128), slots=128)
    assert all([world.grow(60, "a"), world.grow(3, "b"), world.grow(1, "c")])
    sizes = []
    for needed, name in ((0, "b"), (70 * SLOT, "c"), (70 * SLOT, "a")):
        world.waiting.needed_bytes = needed
        world.end(name)
        placed = world.tier.place("1", 70 * SLOT)
        sizes.append(world.arena_slots)
        world.check()
    assert placed
    assert sizes == [64, 67, 71], "less than a share moves only for the oldest request"


def test_what_moves_between_two_steps_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.budget, "_most_moved", 3)
    for name in ("a", "b"):
        assert world.grow(14, name)
    world.end("a")
    copied = list[int]()
    monkeypatch.setattr(world.scheduler, "withdraw", _counting(world.scheduler.withdraw, copied))
    for _ in range(10):
        if world.tier.place("1", 44 * SLOT):
            break
        world.check()
    assert "1" in world.tier.entries
    assert max(copied) == 3
    assert len(copied) > 2
    world.check()


def _counting(withdraw: Any, copied: list[int]) -> Any:
    def call(count: int, most: int) -> dict[int, int]:
        moves: dict[int, int] = withdraw(count, most)
        copied.append(len(moves))
        return moves

    return call


def _in_pieces(world: World) -> list[str]:
    """Thirty-two adapters of a slot, every other one gone: sixteen slots are free, no two of them together."""
    names = [str(number) for number in range(32)]
    assert all(world.tier.place(name, SLOT) for name in names)
    world.tier.remove(*names[::2])
    return names[1::2]


def test_free_bytes_in_pieces_are_put_together_and_nobody_leaves(world: World) -> None:
    """More blocks are in the way than move in a step: the adapter waits for the next one."""
    names, steps = _in_pieces(world), 0
    world.tier.device.placement.most_moved = 3 * SLOT
    world.pass_steps(1)
    while not world.tier.place("99", 14 * SLOT):
        steps += 1
        world.pass_steps(1)
        world.check()
    assert 3 < steps < 8
    assert world.tier.evicted == []
    assert world.tier.entries.keys() == {*names, "99"}
    assert world.arena_slots == 32, "the pages were not asked"
    world.check()


def test_pieces_are_put_together_whoever_asks(world: World) -> None:
    _in_pieces(world)
    assert world.tier.place("99", 14 * SLOT, awaited=False)
    assert world.tier.evicted == []


def test_only_as_many_leave_as_bytes_are_lacking(world: World) -> None:
    names = _in_pieces(world)
    assert world.grow(32)
    world.pass_steps()
    while not world.tier.place("99", 18 * SLOT):
        world.pass_steps(1)
    assert world.tier.evicted == names[:2]
    world.check()


def test_nobody_leaves_while_the_pages_still_give(world: World) -> None:
    """What is wanted comes in several steps, since held pages move out of the way."""
    world.budget._most_moved = 3
    for name in ("a", "b"):
        assert world.grow(14, name)
    world.end("a")
    assert all(world.tier.place(str(number), 8 * SLOT) for number in range(4))
    steps = 0
    while not world.tier.place("99", 12 * SLOT):
        steps += 1
        world.pass_steps(1)
        world.check()
    assert steps > 1
    assert world.tier.evicted == []


def test_nobody_leaves_for_room_that_is_only_the_pages_to_give(world: World) -> None:
    """Who is not awaited gets nothing from the pages, so evictions must be enough by themselves."""
    assert world.tier.place("1", 8 * SLOT)
    assert world.tier.place("2", 24 * SLOT)
    world.tier.refer("2")
    assert not world.tier.place("3", 9 * SLOT, awaited=False)
    assert world.tier.evicted == []


def test_what_moves_in_a_step_is_bounded_over_all_who_want_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _in_pieces(world)
    placement, moved = world.tier.device.placement, list[int]()
    placement.most_moved = 4 * SLOT
    move = placement._move_some
    monkeypatch.setattr(placement, "_move_some", lambda blocks: moved.append(len(found := move(blocks))) or found)
    world.pass_steps(1)
    for number in range(6):
        world.tier.place(str(90 + number), 5 * SLOT, set(world.tier.entries), awaited=False)
    world.tier.device.give_room(12 * SLOT, ())
    assert sum(moved) == 4
    world.check()


def test_each_score_is_looked_at_once_for_all_that_leave(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(world.tier.place(str(number), SLOT) for number in range(32))
    score, looked = world.tier.policy._score, list[str]()
    monkeypatch.setattr(world.tier.policy, "_score", lambda digest: looked.append(digest) or score(digest))
    placed = world.tier.place("99", 28 * SLOT, awaited=False)
    assert placed
    assert len(world.tier.evicted) == 28
    assert len(looked) == 32


@pytest.mark.parametrize("period", [1, 5, CALM, 3 * CALM])
def test_demand_that_alternates_moves_the_border_seldom(world: World, period: int) -> None:
    """Sequences and adapters want more than half of it in turns: the border turns round at most once in CALM steps."""
    borders = [world.pages.first]
    for step in range(40 * CALM):
        world.pass_steps(1)
        if step // period % 2:
            world.grow(40)
            world.end()
        elif world.tier.place("1", 40 * SLOT):
            world.tier.remove("1")
        borders += [world.pages.first] if world.pages.first != borders[-1] else []
        world.check()
    ways = [after > before for before, after in pairwise(borders)]
    turns = sum(one != other for one, other in pairwise(ways))
    assert len(borders) > 1
    assert turns <= 2 * 40
    assert world.budget.moves <= 2 * 40 + SHARES


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    pages=st.tuples(st.integers(1, 20), st.integers(20, 40), st.integers(40, 64)),
    adapters=st.tuples(st.integers(0, 20), st.integers(44, 64)),
    steps=st.integers(1, 150),
)
def test_whatever_both_sides_want_nothing_is_lost_and_the_buffer_is_tiled(
    seed: int, pages: tuple[int, int, int], adapters: tuple[int, int], steps: int
) -> None:
    """Sequences grow, end and leave cached pages; adapters come, are referenced and leave."""
    rng = random.Random(seed)
    least, most = min(adapters[0], 64 - pages[1]), max(adapters[1], 64 - pages[1])
    world = World(
        Bounds(pages[0], pages[1], min(pages[2], 64 - least)), Bounds(least, 64 - pages[1], min(most, 64 - pages[0]))
    )
    for step in range(steps):
        world.pass_steps(rng.choice([1, 1, 1, CALM]))
        world.waiting.needed_bytes = rng.choice([0, 0, 0, 30 * SLOT])
        if rng.random() < 0.6:
            world.grow(rng.randint(1, 12), rng.choice("abc"))
        elif world.held:
            world.end(rng.choice(sorted(world.held)), cached=rng.random() < 0.7)
        world.check()
        if rng.random() < 0.7:
            world.waiting.kept = {name for name in world.tier.entries if rng.random() < 0.2}
            size = rng.choice([rng.randint(1, 16), 30]) * SLOT - rng.choice([0, 256])
            if world.tier.place(str(step), size, world.waiting.kept) and rng.random() < 0.5:
                world.tier.refer(str(step))
        elif world.tier.entries:
            world.tier.remove(rng.choice(sorted(world.tier.entries)))
        world.check()


def test_check_finds_a_border_that_is_not_shared(world: World) -> None:
    world.pages.add(1)
    with pytest.raises(RuntimeError, match="the arena has"):
        world.budget.check()
    world = World(Bounds(8, 32, 64), Bounds(8, 32, 64))
    world.pages.first += 1
    with pytest.raises(RuntimeError, match="slots of adapters"):
        world.budget.check()
