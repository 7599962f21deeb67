"""The scheduler by itself: budgets, order, preemption, the book of pages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.layout import Layout
from onebase.serve.engine.messages import AdapterUse, Request, SamplingParams
from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.scheduler import Room, Scheduler
from onebase.serve.engine.sequence import Sequence, Status


def _sequence(order: int, length: int, adapter: str = "", **request: Any) -> Sequence:
    uses = (AdapterUse(adapter, ""),) if adapter else ()
    sequence = Sequence.of(Request(f"s{order}", tuple(range(length)), SamplingParams(), uses, **request), order)
    sequence.lay_out(Layout())
    return sequence


def _scheduler(num_pages: int = 8, page_size: int = 4, tokens: int = 16, seqs: int = 4) -> Scheduler:
    return Scheduler(PageAllocator(num_pages, page_size), tokens, seqs)


def _always(_: Sequence) -> bool:
    return True


def _nothing(_: Sequence) -> None:
    return None


def _compute(chunks: list[Chunk]) -> None:
    for chunk in chunks:
        chunk.sequence.num_computed += chunk.num_tokens
        if chunk.samples:
            chunk.sequence.tokens.append(0)


def test_a_long_prompt_runs_in_chunks_beside_decodes() -> None:
    scheduler = _scheduler(num_pages=20, tokens=8)
    scheduler.add(_sequence(0, 3))
    _compute(scheduler.schedule(_always, _nothing, _nothing))
    scheduler.add(_sequence(1, 18))
    taken = []
    for _ in range(3):
        chunks = scheduler.schedule(_always, _nothing, _nothing)
        taken.append([(chunk.sequence.order, chunk.num_tokens, chunk.samples) for chunk in chunks])
        _compute(chunks)
    assert taken == [[(0, 1, True), (1, 7, False)], [(0, 1, True), (1, 7, False)], [(0, 1, True), (1, 4, True)]]


def test_an_adapter_on_its_way_holds_nobody_back() -> None:
    scheduler = _scheduler()
    for order in range(3):
        scheduler.add(_sequence(order, 2, adapter="" if order else "a"))
    chunks = scheduler.schedule(lambda sequence: not sequence.digests, _nothing, _nothing)
    assert [chunk.sequence.order for chunk in chunks] == [1, 2]
    assert [sequence.order for sequence in scheduler.waiting] == [0]


def test_the_youngest_is_preempted_and_comes_back() -> None:
    scheduler = _scheduler(num_pages=2)
    old, young = _sequence(0, 3), _sequence(1, 2)
    scheduler.add(old)
    scheduler.add(young)
    released: list[Sequence] = []
    while not scheduler.preemptions:
        _compute(scheduler.schedule(_always, _nothing, released.append))
        scheduler.check()
    assert released == [young]
    assert young.status is Status.WAITING
    assert young.num_computed == 0
    assert len(young.tokens) > 2, "what was generated is kept"
    scheduler.finish(old)
    chunks = scheduler.schedule(_always, _nothing, _nothing)
    assert [chunk.sequence for chunk in chunks] == [young]
    assert chunks[0].num_tokens == len(young.tokens)


def test_nobody_is_preempted_or_admitted_while_pages_are_coming() -> None:
    scheduler = _scheduler(num_pages=2)
    answers = [Room.SOON, Room.SOON, Room.NONE]
    for order in range(2):
        scheduler.add(_sequence(order, 3))
    _compute(scheduler.schedule(_always, _nothing, _nothing))
    _compute(scheduler.schedule(_always, _nothing, _nothing))
    scheduler.more_pages = lambda count: answers.pop(0)
    assert scheduler.schedule(_always, _nothing, _nothing) == [], "both sit the step out"
    scheduler.pages.add(2)
    scheduler.finish(scheduler.running[1])
    scheduler.add(_sequence(2, 3))
    assert len(scheduler.schedule(_always, _nothing, _nothing)) == 2
    assert scheduler.preemptions == 0
    scheduler.pages.allocate(scheduler.pages.num_free)
    young = scheduler.running[1]
    _compute(scheduler.schedule(_always, _nothing, _nothing))
    young.tokens.extend(range(9))
    scheduler.schedule(_always, _nothing, _nothing)
    assert scheduler.preemptions == 1, "there is no more"


def test_a_waiting_sequence_is_not_overtaken_for_pages() -> None:
    scheduler = _scheduler(num_pages=4)
    scheduler.add(_sequence(0, 9))
    _compute(scheduler.schedule(_always, _nothing, _nothing))
    scheduler.add(_sequence(1, 10))
    scheduler.add(_sequence(2, 1))
    assert [chunk.sequence.order for chunk in scheduler.schedule(_always, _nothing, _nothing)] == [0]


def test_one_whose_adapter_is_on_its_way_keeps_no_pages_from_the_others() -> None:
    """Nor does it ask for more of them. Once it may start it comes first."""
    scheduler = _scheduler(num_pages=4)
    asked: list[int] = []

    def more(count: int) -> Room:
        asked.append(count)
        return Room.NONE

    scheduler.more_pages = more
    for order, length in ((0, 8), (1, 12), (2, 4), (3, 4)):
        scheduler.add(_sequence(order, length, adapter="a" if order == 1 else ""))
    chunks = scheduler.schedule(lambda sequence: not sequence.digests, _nothing, _nothing)
    assert [chunk.sequence.order for chunk in chunks] == [0, 2]
    assert asked == [1], "for the last one, not for the one that cannot start"
    scheduler.finish(chunks[0].sequence)
    assert [chunk.sequence.order for chunk in scheduler.schedule(_always, _nothing, _nothing)] == [2]
    scheduler.finish(chunks[1].sequence)
    assert [chunk.sequence.order for chunk in scheduler.schedule(_always, _nothing, _nothing)] == [1]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=12),
    num_pages=st.integers(9, 20),
    tokens=st.integers(1, 24),
    seqs=st.integers(1, 5),
    absent=st.integers(0, 3),
)
def test_everyone_finishes_and_every_page_returns(
    lengths: list[tuple[int, int]], num_pages: int, tokens: int, seqs: int, absent: int
) -> None:
    scheduler = _scheduler(num_pages, 4, tokens, seqs)
    wanted = {order: total for order, (_, total) in enumerate(lengths)}
    for order, (length, _) in enumerate(lengths):
        scheduler.add(_sequence(order, length, adapter="a" if order < absent else ""))
    held = 0
    for step in range(3000):
        if not scheduler.waiting and not scheduler.running:
            break
        chunks = scheduler.schedule(lambda s, step=step: not s.digests or step > 5, _nothing, _nothing)
        assert sum(chunk.num_tokens for chunk in chunks) <= tokens
        assert len(scheduler.running) <= seqs
        assert all(chunk.num_tokens > 0 for chunk in chunks)
        _compute(chunks)
        scheduler.check()
        held = max(held, num_pages - scheduler.pages.num_free)
        for sequence in list(scheduler.running):
            if sequence.num_generated >= wanted[sequence.order]:
                scheduler.finish(sequence)
    assert not scheduler.waiting
    assert not scheduler.running
    assert held
    assert scheduler.pages.num_free == num_pages


def test_check_finds_a_lost_page() -> None:
    scheduler = _scheduler()
    sequence = _sequence(0, 3)
    scheduler.add(sequence)
    scheduler.schedule(_always, _nothing, _nothing)
    sequence.pages.clear()
    with pytest.raises(RuntimeError, match="pages"):
        scheduler.check()
