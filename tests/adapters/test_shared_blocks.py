"""The life of blocks that adapters share: loads side by side, unloads, failures, eviction and compaction."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onebase.adapters.packing import pack
from onebase.adapters.program import AdapterProgram, SiteOps
from onebase.adapters.tiers.arena import Arena
from onebase.adapters.tiers.cache import AdapterCache
from onebase.adapters.tiers.entry import Entry
from onebase.adapters.tiers.shared_blocks import SharedBlocks
from onebase.kernels.dispatch import select_kernels
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.ops.shared import SharedLowRank
from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.tables import ProgramTables, SiteShape

WIDTH, RANK = 64, 16
OWN = 128  # elements of an adapter's own block: RANK and WIDTH, each at a border, in whole BLOCK_ALIGNs
PAIR = 2 * WIDTH * RANK  # of one pair of projections
ROWS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))


def _draw(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode())))


def program(name: str) -> AdapterProgram:
    """An adapter over the projections that its first letter names; its vectors are its own."""
    a, b = _draw(f"{name[0]}a", RANK, WIDTH), _draw(f"{name[0]}bb", RANK, WIDTH)
    op = SharedLowRank(a, b, _draw(f"{name}-mid", RANK), _draw(f"{name}--out", WIDTH))
    return AdapterProgram(name, "TEST", {"site": SiteOps(extra=(op,))})


class GatedCache(AdapterCache):
    """Compilations wait for their gates. Copies that fill projections wait for ``fills``, and fail when told to.

    The arena starts as NaN."""

    def __init__(self, num_elements: int) -> None:
        arena = Arena(num_elements, torch.float32, torch.device("cpu"))
        arena.buffer.fill_(float("nan"))
        tables = ProgramTables(arena.buffer, [SiteShape(WIDTH, WIDTH)])
        self.table = InstructionTable()
        self.compile_gates: dict[str, threading.Event] = {}
        self.fills = threading.Event()
        self.fills.set()
        self.fail = False
        self.copied: list[int] = []
        super().__init__(arena, tables, select_kernels(tables), self.table, {"site": 0}, self._slowly)
        self._copy_plainly = self.transit.loader._copy
        self.transit.loader._copy = self._copy  # type: ignore[method-assign]

    def _slowly(self, path: Path, digest: str) -> AdapterProgram:
        if gate := self.compile_gates.get(digest):
            assert gate.wait(10)
        return program(digest)

    def _copy(self, targets: Mapping[int, Tensor], after: Any) -> None:
        assert len(targets) == 1 or self.fills.wait(10)
        if self.fail and len(targets) > 1:
            raise RuntimeError("the device is gone")
        self._copy_plainly(targets, after)
        self.copied.append(sum(data.numel() for data in targets.values()))

    def poll(self) -> None:
        self.collect()
        self.place(wanted=self._entries)

    def want(self, *names: str) -> list[Entry]:
        return [self.fetch(name, name) for name in names]

    def settle(self, until: Callable[[], bool] = lambda: False) -> None:
        """Poll while something is on its way, or until a condition holds."""
        for _ in range(2000):
            self.poll()
            self.check()
            if until() or not self.busy:
                return
            time.sleep(0.001)
        raise AssertionError("it did not settle")

    def load(self, *names: str) -> None:
        self.want(*names)
        self.settle()
        for name in names:
            self.assert_exact(name)

    def assert_exact(self, name: str) -> None:
        assert self.is_ready(name)
        plan = BatchPlan(len(ROWS), [Segment(0, len(ROWS), self.fetch(name, name).handle)])
        work = self.table.work("site", plan, torch.device("cpu"))
        assert work is not None
        got = torch.zeros(len(ROWS), WIDTH)
        work.change_output(got, ROWS)
        op = program(name).ops["site"].extra[0]
        torch.testing.assert_close(got.double(), op.reference(ROWS), atol=1e-3, rtol=1e-4)  # type: ignore[attr-defined]


@pytest.fixture
def cache_of() -> Iterator[Callable[[int], GatedCache]]:
    made: list[GatedCache] = []

    def make(num_elements: int) -> GatedCache:
        made.append(GatedCache(num_elements))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def _first_copy_held(cache: GatedCache, first: str, second: str) -> tuple[Entry, Entry]:
    """The first one's copy fills what they share and waits; the second one's is done."""
    cache.fills.clear()
    (one,) = cache.want(first)
    cache.settle(lambda: one.state == "copying")
    (two,) = cache.want(second)
    cache.settle(lambda: two.state == "copying" and not two.working)
    assert len(one.filling) == 2
    assert two.filling == ()
    return one, two


def test_an_adapter_waits_for_the_copy_that_fills_what_it_shares(cache_of: Callable[[int], GatedCache]) -> None:
    cache = cache_of(2 * OWN + PAIR)
    one, two = _first_copy_held(cache, "x1", "x2")
    for _ in range(3):
        cache.poll()
        assert two.state == "copying"
        assert not cache.is_ready("x2")
    cache.fills.set()
    cache.settle()
    assert sorted(cache.copied) == [OWN - 48, OWN - 48 + PAIR]
    cache.assert_exact("x1")
    cache.assert_exact("x2")
    assert one.state == two.state == "ready"
    assert cache.arena.used == 2 * OWN + PAIR


def test_one_that_was_asked_for_first_and_placed_second_becomes_ready(cache_of: Callable[[int], GatedCache]) -> None:
    """It is looked at before the one that fills, so it takes another poll: the cache must say that it is busy."""
    cache = cache_of(2 * OWN + PAIR)
    cache.compile_gates["x1"] = threading.Event()
    cache.fills.clear()
    late, early = cache.want("x1", "x2")
    cache.settle(lambda: early.state == "copying")
    cache.compile_gates["x1"].set()
    cache.settle(lambda: late.state == "copying" and not late.working)
    work = early.copying
    cache.fills.set()
    assert isinstance(work, Future)
    work.result(10)
    cache.poll()
    assert early.state == "ready"
    assert late.state == "ready" or cache.busy
    cache.settle()
    cache.assert_exact("x1")


def test_unloading_the_one_that_fills_leaves_the_other_whole(cache_of: Callable[[int], GatedCache]) -> None:
    cache = cache_of(2 * OWN + PAIR)
    _first_copy_held(cache, "x1", "x2")
    assert cache.unload("x1")
    assert not cache.is_ready("x1")
    cache.fills.set()
    cache.settle()
    cache.assert_exact("x2")
    assert cache.arena.used == OWN + PAIR
    assert cache.unload("x2")
    assert cache.arena.used == len(cache.shared) == 0
    cache.load("x1")


def test_unloading_the_one_that_waits(cache_of: Callable[[int], GatedCache]) -> None:
    cache = cache_of(2 * OWN + PAIR)
    _first_copy_held(cache, "x1", "x2")
    assert cache.unload("x2")
    cache.check()
    cache.fills.set()
    cache.settle()
    cache.assert_exact("x1")
    assert cache.arena.used == OWN + PAIR


def test_unloading_while_compiling_leaves_nothing(cache_of: Callable[[int], GatedCache]) -> None:
    cache = cache_of(2 * OWN + PAIR)
    gate = cache.compile_gates["x1"] = threading.Event()
    cache.want("x1")
    assert cache.unload("x1")
    gate.set()
    cache.settle()
    assert cache.arena.used == 0
    assert cache.parts("x1") == {}


def test_a_failed_copy_fails_those_who_waited_and_nobody_after_them(cache_of: Callable[[int], GatedCache]) -> None:
    cache = cache_of(3 * OWN + PAIR)
    one, two = _first_copy_held(cache, "x1", "x2")
    cache.fail = True
    cache.fills.set()
    cache.settle()
    assert [entry.error is not None for entry in (one, two)] == [True, True]
    assert cache.arena.used == 0
    cache.fail = False
    cache.load("x1", "x2", "x3")


def test_a_newcomer_fills_a_broken_block_again() -> None:
    blocks = SharedBlocks(Arena(4 * PAIR, torch.float32, torch.device("cpu")))
    tensors = {"k": torch.zeros(PAIR)}
    start = blocks.acquire(tensors)
    assert start is not None
    assert blocks.acquire(tensors) == {}
    blocks.filled(start, broken=True)
    blocks.release(start)  # the one whose copy failed
    assert blocks.any_broken(tensors)
    assert blocks.acquire(tensors) == start
    assert not blocks.are_filled(tensors)
    assert not blocks.any_broken(tensors)
    blocks.filled(start)
    assert blocks.are_filled(tensors)
    assert blocks.num_references == 2


def test_equal_tensors_are_packed_once_whether_or_not_they_are_one_object() -> None:
    a, b = _draw("x", RANK, WIDTH), _draw("yy", RANK, WIDTH)
    op = SharedLowRank(a, b, _draw("m", RANK), _draw("o", WIDTH))
    same, equal = replace(op), replace(op, a=a.clone(), b=b.clone())
    other = replace(op, a=a + 1)
    sites = {str(at): SiteOps(extra=(one,)) for at, one in enumerate((op, same, equal, other))}
    packed = pack(AdapterProgram("d", "TEST", sites), torch.bfloat16)
    assert len(packed.shared) == 3
    keys = [packed.extra[path][0].slots["a"].shared for path in sites]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    for key, tensor in ((keys[0], a), (keys[3], a + 1)):
        assert key is not None
        assert torch.equal(packed.shared[key], tensor.bfloat16().flatten())


def test_no_room_for_one_of_them_takes_none() -> None:
    arena = Arena(3 * PAIR, torch.float32, torch.device("cpu"))
    blocks = SharedBlocks(arena)
    assert blocks.acquire({"k": torch.zeros(PAIR)}) is not None
    used = arena.used
    assert blocks.acquire({"k": torch.zeros(PAIR), "l": torch.zeros(PAIR), "m": torch.zeros(2 * PAIR)}) is None
    assert (arena.used, len(blocks), blocks.num_references) == (used, 1, 1)
    arena.check()


def test_eviction_frees_what_is_shared_with_its_last_user(cache_of: Callable[[int], GatedCache]) -> None:
    cache = cache_of(3 * OWN + PAIR)
    cache.load("x1", "x2", "x3")
    cache.acquire("x3")
    cache.want("x4")
    cache.settle()
    assert [cache.is_ready(name) for name in ("x1", "x2", "x3", "x4")] == [False, True, True, True]
    cache.want("y1")
    cache.settle()  # x3 runs and keeps the projections of x: there is no room for those of y
    assert not cache.is_ready("y1")
    cache.assert_exact("x3")
    cache.release("x3")
    for _ in range(2000):
        cache.poll()
        if cache.is_ready("y1"):
            break
        time.sleep(0.001)
    cache.assert_exact("y1")
    assert not cache.is_ready("x3")
    assert len(cache.shared) == 2


def test_compaction_moves_shared_blocks_and_keeps_their_content(cache_of: Callable[[int], GatedCache]) -> None:
    cache = cache_of(3 * (OWN + PAIR))
    cache.load("x1")
    cache.load("y1")
    cache.load("y2")
    cache.load("z1")
    cache.unload("x1")  # a hole at the front that is too small
    cache.acquire("y1")
    cache.acquire("y2")
    cache.acquire("z1")
    before = {block.start for block in cache.shared}
    cache.load("y3")
    assert cache.device.placement.compact(cache.device.entries)
    cache.check()
    assert {block.start for block in cache.shared} != before
    for name in ("y1", "y2", "y3", "z1"):
        cache.assert_exact(name)


def test_what_adapters_take_together(cache_of: Callable[[int], GatedCache]) -> None:
    cache = cache_of(3 * (OWN + PAIR))
    cache.load("x1", "x2", "y1")
    together = {**cache.parts("x1"), **cache.parts("x2")}
    assert sum(together.values()) == 4 * (2 * OWN + PAIR)
    assert sum({**together, **cache.parts("y1")}.values()) == cache.arena.used_bytes


@pytest.mark.parametrize("seed", range(3))
def test_random_lives(seed: int, cache_of: Callable[[int], GatedCache]) -> None:
    """Loads, unloads, references, evictions and compactions in any order: books agree, ready ones are exact."""
    cache, draw = cache_of(4 * OWN + 2 * PAIR), random.Random(seed)
    names = [f"{letter}{number}" for letter in "xyz" for number in range(3)]
    held: list[str] = []
    for _ in range(300):
        name = draw.choice(names)
        action = draw.choice(("want", "want", "unload", "acquire", "release", "settle", "forget"))
        if action == "want":
            cache.want(name)
        elif action == "unload":
            cache.unload(name)
        elif action == "acquire" and cache.is_ready(name) and len(held) < 2:
            cache.acquire(name)
            held.append(name)
        elif action == "release" and held:
            cache.release(held.pop(draw.randrange(len(held))))
        elif action == "settle":
            cache.settle()
            for ready in filter(cache.is_ready, names):
                cache.assert_exact(ready)
        else:
            cache.collect()
            cache.place(wanted=held)
        cache.poll()
        cache.check()
    for name in held:
        cache.release(name)
    for name in names:
        cache.unload(name)
    cache.settle()
    assert cache.arena.used == len(cache.shared) == 0
