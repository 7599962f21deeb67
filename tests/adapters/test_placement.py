"""Compaction in bounded pieces: nothing is lost, what a copy fills is left alone, and it comes to an end."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from onebase.adapters.packing import PackedProgram
from onebase.adapters.tiers import placement
from onebase.adapters.tiers.arena import BLOCK_ALIGN, Arena
from onebase.adapters.tiers.entry import Entry, State
from onebase.adapters.tiers.placement import Placement
from onebase.adapters.tiers.shared_blocks import SharedBlocks
from onebase.adapters.traits import Traits

UNIT = BLOCK_ALIGN
BYTES = 4 * UNIT  # of a block of one unit


class Installs:
    """An installer that remembers for whom it worked."""

    def __init__(self) -> None:
        self.installed: list[str] = []

    def install(self, entry: Entry) -> None:
        self.installed.append(entry.digest)

    def uninstall(self, entry: Entry) -> None:
        pass


class Book:
    """An arena whose blocks hold their own number."""

    def __init__(self, units: int) -> None:
        self.arena = Arena(units * UNIT, torch.float32, torch.device("cpu"))
        self.shared = SharedBlocks(self.arena)
        self.installs: Any = Installs()
        self.placement = Placement(self.arena, self.shared, self.installs)
        self.entries: dict[str, Entry] = {}
        self.values: dict[str, float] = {}

    def put(self, name: str, units: int = 1, shared: tuple[str, ...] = (), state: State = State.READY) -> bool:
        flats = {key: torch.zeros(2 * UNIT) for key in shared}
        packed = PackedProgram(name, "TEST", 0, 0, Traits(), torch.zeros(units * UNIT), {}, {}, flats)
        found = self.placement.allocate(packed)
        if found is None:
            return False
        entry = self.entries[name] = Entry(name, "", state)
        entry.take(packed)
        entry.state, entry.block = state, found.start
        for key, start, size in ((name, found.start, units), *((key, start, 2) for key, start in found.new.items())):
            self.values[key] = float(len(self.values) + 1)
            self.arena.buffer[start : start + size * UNIT] = self.values[key]
        return True

    def drop(self, name: str) -> None:
        self.placement.free(self.entries.pop(name))

    def compact(self) -> bool:
        """In a step of its own."""
        self.placement.begin_step()
        return self.placement.compact(self.entries.values())

    def check(self) -> None:
        self.arena.check()
        blocks = [(entry.digest, entry.block, entry.num_elements) for entry in self.entries.values()]
        blocks += [(key, block.start, block.num_elements) for key, block in self.shared.items()]
        for key, start, size in blocks:
            assert (self.arena.buffer[start : start + size] == self.values[key]).all(), key


def _holes(count: int) -> Book:
    """Every other one of ``count`` blocks is free."""
    book = Book(count)
    for number in range(count):
        assert book.put(str(number))
    for number in range(0, count, 2):
        book.drop(str(number))
    return book


def test_a_bounded_number_of_bytes_moves_at_a_time() -> None:
    book = _holes(20)
    book.placement.most_moved = 3 * BYTES
    for moved in (3, 6, 9, 10):
        assert book.compact()
        assert len(book.installs.installed) == moved
        book.check()
    assert not book.compact()
    assert book.arena.tail_bytes == book.arena.free_bytes == 10 * BYTES


def test_the_bound_is_for_all_calls_of_one_step() -> None:
    book = _holes(20)
    book.placement.most_moved = 3 * BYTES
    book.compact()
    assert not book.placement.compact(book.entries.values())
    assert len(book.installs.installed) == 3
    book.check()


def test_a_block_over_the_bound_moves_alone() -> None:
    book = Book(12)
    for name, units in (("a", 1), ("big", 5), ("b", 1)):
        book.put(name, units)
    book.drop("a")
    book.placement.most_moved = BYTES
    assert book.compact()
    assert book.installs.installed == ["big"]
    book.check()


def test_what_a_copy_fills_stays_where_it_is() -> None:
    book = Book(12)
    book.put("a")
    book.put("copying", shared=("k",), state=State.COPYING)
    book.put("b", shared=("k",))
    book.drop("a")
    before = book.entries["copying"].block, book.shared.starts(["k"])
    assert book.compact()
    assert book.installs.installed == ["b"]
    assert (book.entries["copying"].block, book.shared.starts(["k"])) == before
    book.check()
    book.entries["copying"].state = State.READY
    while book.compact():
        book.check()
    assert book.arena.tail_bytes == book.arena.free_bytes


def test_who_shares_a_moved_block_is_installed_anew() -> None:
    book = Book(12)
    book.put("a")
    book.put("x", shared=("k",))
    book.put("y", shared=("k",))
    book.drop("a")
    book.placement.most_moved = 0  # one block at a time
    seen = set()
    while book.compact():
        seen.add(tuple(sorted(book.installs.installed)))
        book.installs.installed.clear()
        book.check()
    assert ("x", "y") in seen


@pytest.mark.parametrize("seed", range(10))
def test_random_lives(seed: int) -> None:
    draw, book = random.Random(seed), Book(40)
    book.placement.most_moved = 4 * BYTES
    for number in range(400):
        names = sorted(book.entries)
        action = draw.choice(("put", "put", "drop", "compact", "state"))
        if action == "put":
            shared = tuple(draw.sample("klm", draw.randrange(3)))
            state = draw.choice((State.READY, State.READY, State.COPYING))
            book.put(f"n{number}", draw.randrange(1, 6), shared, state)
        elif action == "drop" and names:
            book.drop(draw.choice(names))
        elif action == "state" and names:
            book.entries[draw.choice(names)].state = State.READY
        else:
            book.compact()
        book.check()
    for entry in book.entries.values():
        entry.state = State.READY
    steps = 0
    while book.compact():
        steps += 1
        book.check()
    assert steps <= 40
    assert book.arena.tail_bytes == book.arena.free_bytes


@pytest.mark.parametrize("gap", [1, 3, 5])
def test_a_block_that_moves_onto_itself_arrives_whole(gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that are larger and smaller than the way it goes; the copies beside the budget stay as small."""
    monkeypatch.setattr(placement, "_PIECE_BYTES", 3 * BYTES)
    book = Book(20)
    book.put("gap", gap)
    book.put("moves", 11)
    start = book.entries["moves"].block
    want = torch.arange(11.0 * UNIT)
    book.arena.buffer[start : start + len(want)] = want
    book.drop("gap")
    book.placement.begin_step()
    assert book.placement.compact(book.entries.values())
    assert book.entries["moves"].block == 0
    assert torch.equal(book.arena.buffer[: len(want)], want)
