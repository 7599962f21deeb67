"""Pages whose number changes: slots are withdrawn from the low end and added there, and what pages hold survives it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.serve.engine.messages import Request, SamplingParams
from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.prefix_cache import ROOT, Block, PrefixCache
from onebase.serve.engine.scheduler import Room, Scheduler
from onebase.serve.engine.sequence import Sequence

PAGE = 4


class World:
    """Holders of pages, and what each page is known to contain; contents move as the allocator says."""

    def __init__(self, num_pages: int, first: int) -> None:
        self.pages = PageAllocator(num_pages, PAGE, PrefixCache(), first)
        self.contents: dict[int, int] = {}
        self.held: list[list[int]] = []
        self.blocks: dict[int, Block] = {}  # what was cached, by content
        self.made = 0

    def take(self, count: int, *, cache: bool) -> None:
        got = self.pages.allocate(count)
        if got is None:
            assert count > self.pages.num_free
            return
        assert all(self.pages.first <= page < self.pages.first + self.pages.num_pages for page in got)
        for page in got:
            self.made += 1
            self.contents[page] = self.made
            if cache:
                self.blocks[self.made] = Block.of(ROOT, (self.made,), ())
                assert self.pages.cache is not None
                self.pages.cache.add(page, self.blocks[self.made])
        self.held.append(got)

    def fork(self, which: int) -> None:
        """A second holder of what is cached, or a new one of what is idle."""
        for block in list(self.blocks.values())[which % max(1, len(self.blocks)) :][:1]:
            found = self.pages.find([block])
            self.pages.share(found)
            if found:
                self.held.append(found)

    def free(self, which: int) -> None:
        if self.held:
            self.pages.free(self.held.pop(which % len(self.held)))

    def withdraw(self, count: int, most: int) -> None:
        count = min(count, self.pages.num_free)
        before = self.pages.num_pages
        moves = self.pages.withdraw(count, most)
        assert len(moves) <= most
        assert before - count <= self.pages.num_pages <= before
        assert not set(moves) & set(moves.values())
        assert min(moves.values(), default=self.pages.first) >= self.pages.first
        self.contents |= {new: self.contents[old] for old, new in moves.items()}
        self.held = [[moves.get(page, page) for page in pages] for pages in self.held]

    def known(self) -> list[list[int]]:
        return [[self.contents[page] for page in pages] for pages in self.held]

    def check(self) -> None:
        self.pages.check(self.held)
        for content, block in self.blocks.items():
            assert all(self.contents[page] == content for page in self.pages.find([block])), "the cache finds its page"


OPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 5), st.booleans()),
        st.tuples(st.just("free"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("fork"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("withdraw"), st.integers(1, 8), st.integers(0, 6)),
        st.tuples(st.just("add"), st.integers(1, 8), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(OPS, st.integers(1, 20), st.integers(0, 12))
def test_whatever_moves_holders_and_the_cache_find_their_contents(
    ops: list[tuple[str, int, int]], num_pages: int, first: int
) -> None:
    world = World(num_pages, first)
    total = num_pages + first
    for name, number, more in ops:
        before = world.known()
        if name == "take":
            world.take(number, cache=bool(more))
        elif name == "add":
            world.pages.add(min(number, world.pages.first))
        elif name == "withdraw":
            world.withdraw(number, more)
            assert world.known() == before
        else:
            getattr(world, name)(number)
        world.check()
        assert world.pages.first + world.pages.num_pages == total
    while world.held:
        world.free(0)
    world.check()
    assert world.pages.num_free == world.pages.num_pages


def test_pages_are_handed_out_far_from_the_border_and_upwards() -> None:
    """So that nothing has to move when adapters need the low end, and a prompt is read upwards."""
    pages = PageAllocator(8, PAGE, first=10)
    assert pages.allocate(3) == [15, 16, 17]
    assert pages.withdraw(5, 0) == {}
    assert (pages.first, pages.num_pages, pages.num_free) == (15, 3, 0)
    pages.add(2)
    assert pages.allocate(2) == [13, 14]


def test_what_has_been_idle_longest_goes_first_wherever_it_lies() -> None:
    """Two cached pages, one of them to go: the older, though the younger one is where the room is needed."""
    cache = PrefixCache()
    pages = PageAllocator(3, PAGE, cache)
    blocks = [Block.of(ROOT, (token,), ()) for token in range(3)]
    for block in blocks:
        (page,) = pages.allocate(1) or []
        cache.add(page, block)
        pages.free([page])
    assert [pages.find([block]) for block in blocks] == [[2], [1], [0]]
    assert pages.withdraw(1, 1) == {0: 2}
    assert [pages.find([block]) for block in blocks] == [[], [1], [2]]
    pages.check()


def test_running_sequences_follow_their_pages() -> None:
    scheduler = Scheduler(PageAllocator(6, PAGE), 64, 4)
    for name in ("a", "b"):
        scheduler.add(Sequence.of(Request(name, tuple(range(8)), SamplingParams(1)), len(scheduler.waiting)))
    chunks = scheduler.schedule(lambda _: True, lambda _: None, lambda _: None)
    assert [chunk.sequence.pages for chunk in chunks] == [[4, 5], [2, 3]]
    scheduler.finish(chunks[0].sequence)
    assert scheduler.withdraw(4, 1) == {2: 5}, "one may be copied, so only as much is given up"
    assert chunks[1].sequence.pages == [5, 3]
    scheduler.check()
    assert scheduler.withdraw(1, 1) == {3: 4}
    assert chunks[1].sequence.pages == [5, 4]
    scheduler.check()


def test_a_sequence_is_not_preempted_where_there_are_more_pages() -> None:
    scheduler = Scheduler(PageAllocator(2, PAGE, first=5), 64, 4)
    asked = list[int]()

    def more(count: int) -> Room:
        asked.append(count)
        scheduler.pages.add(count)
        return Room.NOW

    scheduler.more_pages = more
    scheduler.add(Sequence.of(Request("a", tuple(range(8)), SamplingParams(9)), 0))
    (chunk,) = scheduler.schedule(lambda _: True, lambda _: None, lambda _: None)
    assert asked == [1], "the prompt and the next token need three pages"
    scheduler.computed([chunk])
    for token in range(5):
        chunk.sequence.tokens.append(token)
        (chunk,) = scheduler.schedule(lambda _: True, lambda _: None, lambda _: None)
        scheduler.computed([chunk])
    assert asked == [1, 1]
    assert scheduler.preemptions == 0
    assert len(chunk.sequence.pages) == 4


@pytest.mark.parametrize("wrong", ["first", "num_pages"])
def test_check_finds_a_border_that_is_not_where_it_should_be(wrong: str) -> None:
    pages = PageAllocator(4, PAGE, first=3)
    setattr(pages, wrong, getattr(pages, wrong) + 1)
    with pytest.raises(RuntimeError, match="pages"):
        pages.check()


def test_many_random_moves_keep_a_large_cache_in_order() -> None:
    """The order in which idle pages are evicted is not changed by moves."""
    rng, world = random.Random(3), World(64, 0)
    world.take(60, cache=True)
    world.free(0)
    assert world.pages.cache is not None
    order = [world.contents[page] for page in world.pages.cache._idle]
    for _ in range(10):
        world.withdraw(rng.randint(1, 4), 64)
    left = [world.contents[page] for page in world.pages.cache._idle]
    assert left == order[len(order) - len(left) :]
