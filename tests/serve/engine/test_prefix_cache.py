"""The prefix cache: what a sequence finds in its pages is what it would have computed itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.adapters.program import Window
from onebase.adapters.tiers.entry import Entry, State
from onebase.adapters.traits import Traits
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.layout import Layout
from onebase.serve.engine.messages import AdapterUse, Request, SamplingParams
from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.prefix_cache import ROOT, Block, PrefixCache
from onebase.serve.engine.scheduler import Scheduler
from onebase.serve.engine.sequence import Sequence

PAGE = 4
TRAITS = {
    "plain": Traits(),
    "activated": Traits(invocation=(1, 0)),
    "soft": Traits(num_virtual_tokens=3, first_position=3),
    "windowed": Traits(window=Window(3, 5)),
    "stored": Traits(num_virtual_tokens=6, first_position=6, stores_prefix=True),
}


def _sequence(order: int, prompt: tuple[int, ...], adapter: str | None, scale: float) -> Sequence:
    uses = () if adapter is None else (AdapterUse(adapter, "", scale),)
    sequence = Sequence.of(Request(f"s{order}", prompt, SamplingParams(), uses), order)
    if adapter is not None:
        sequence.adapters = (Entry(adapter, "", State.READY, handle=len(adapter)),)
        sequence.lay_out(Layout.of(prompt, [(TRAITS[adapter], scale)]))
    return sequence


class Pages:
    """What K/V the pages hold, as the history that it depends on: (token, what acts on its row) of all slots so far."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], tuple[Any, ...]] = {}

    def run(self, chunk: Chunk) -> None:
        """Compute a chunk: what it attends to must be there, and what it writes replaces what was there."""
        sequence = chunk.sequence
        history = [(sequence.tokens[slot], sequence.uses_at(slot)) for slot in range(chunk.stop)]
        copied = sequence.uncopied
        for slot in [*copied, *range(chunk.start, chunk.stop)]:
            self.held[self._place(sequence, slot)] = tuple(history[: slot + 1])
        for slot in range(chunk.stop):
            assert self.held[self._place(sequence, slot)] == tuple(history[: slot + 1])

    @staticmethod
    def _place(sequence: Sequence, slot: int) -> tuple[int, int]:
        return sequence.pages[slot // PAGE], slot % PAGE


JOBS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=14),
        st.sampled_from([None, None, *TRAITS]),
        st.sampled_from([1.0, 0.5]),
        st.integers(1, 9),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(jobs=JOBS, num_pages=st.integers(8, 18), tokens=st.integers(1, 20), seqs=st.integers(1, 5))
def test_pages_hold_what_their_sequences_need(
    jobs: list[tuple[list[int], str | None, float, int]], num_pages: int, tokens: int, seqs: int
) -> None:
    scheduler = Scheduler(PageAllocator(num_pages, PAGE, PrefixCache()), tokens, seqs)
    pages = Pages()
    left = [
        (_sequence(order, tuple(prompt), adapter, scale), length)
        for order, (prompt, adapter, scale, length) in enumerate(jobs)
    ]
    wanted = {sequence.id: length for sequence, length in left}
    for step in range(2000):
        if left and step % 2 == 0:
            scheduler.add(left.pop(0)[0])
        chunks = scheduler.schedule(lambda _: True, lambda _: None, lambda _: None)
        for chunk in chunks:
            assert chunk.num_tokens > 0
            pages.run(chunk)
        for chunk in chunks:
            scheduler.computed([chunk])
            if chunk.samples:
                chunk.sequence.tokens.append(step % 2)
        scheduler.check()
        for sequence in list(scheduler.running):
            if sequence.num_generated >= wanted[sequence.id]:
                scheduler.finish(sequence)
                scheduler.check()
        if not left and not scheduler.waiting and not scheduler.running:
            break
    assert not scheduler.waiting
    assert not scheduler.running
    assert scheduler.pages.num_free == num_pages


def test_a_window_shares_what_is_far_from_the_end() -> None:
    longer = (*LONG, 1, 1, 1, 1)
    assert _cached((LONG, "windowed", 1.0), (longer, "windowed", 1.0), (longer, "windowed", 1.0)) == [0, 4, 12]


def _run(scheduler: Scheduler, sequence: Sequence) -> int:
    """Prefill it alone and take it out again; slots that the cache gave."""
    scheduler.add(sequence)
    cached = 0
    while sequence.num_uncomputed:
        for chunk in scheduler.schedule(lambda _: True, lambda _: None, lambda _: None):
            cached = cached or sequence.num_cached
            scheduler.computed([chunk])
    scheduler.check()
    scheduler.finish(sequence)
    return cached


def _cached(*jobs: tuple[tuple[int, ...], str | None, float], num_pages: int = 40) -> list[int]:
    scheduler = Scheduler(PageAllocator(num_pages, PAGE, PrefixCache()), 64, 4)
    return [_run(scheduler, _sequence(order, *job)) for order, job in enumerate(jobs)]


LONG = tuple(range(2, 14))


def test_the_last_token_is_always_computed() -> None:
    assert _cached((LONG, None, 1.0), (LONG, None, 1.0), ((*LONG, 1), None, 1.0)) == [0, 8, 12]


def test_adapters_and_scales_do_not_share() -> None:
    jobs = [(LONG, use, scale) for use, scale in ((None, 1.0), ("plain", 1.0), ("plain", 0.5), ("soft", 1.0))]
    assert _cached(*jobs) == [0, 0, 0, 0]
    assert _cached(*jobs, *jobs)[4:] == [8, 8, 8, 12]


def test_rows_before_an_invocation_share_the_base() -> None:
    prompt = (*LONG, 1, 0, 5)
    assert _cached((prompt, None, 1.0), (prompt, "activated", 1.0)) == [0, 12]
    assert _cached((prompt, "activated", 1.0), (prompt, None, 1.0)) == [0, 12]
    assert _cached((LONG, "activated", 1.0), (LONG, None, 1.0)) == [0, 8], "never invoked"
    inside = (*LONG[:9], 1, 0, *LONG)
    assert _cached((inside, None, 1.0), (inside, "activated", 1.0), (inside, "activated", 1.0)) == [0, 8, 20]


def test_the_same_tokens_activated_elsewhere_do_not_share() -> None:
    early, late = (1, 0, 2, 1, 3, *LONG), (1, 0, 2, 1, 0, *LONG)
    assert _cached((early, "activated", 1.0), (late, "activated", 1.0)) == [0, 0]


def test_stored_prefixes_are_found_up_to_where_they_differ() -> None:
    assert _cached((LONG, "stored", 1.0), (LONG, "stored", 1.0), ((99, *LONG), "stored", 1.0)) == [0, 16, 4]


def test_the_longest_idle_pages_are_evicted_and_prefixes_outlive_their_children() -> None:
    other = tuple(range(50, 66))
    first, second, again = _cached((LONG, None, 1.0), (other, None, 1.0), (LONG, None, 1.0), num_pages=5)
    assert (first, second) == (0, 0)
    assert again == 4, "of three idle pages two were taken, the last ones first"


def test_a_key_is_not_trusted_alone() -> None:
    cache = PrefixCache()
    block = Block.of(ROOT, (1, 2), ())
    cache.add(3, block)
    assert cache.find(block) == 3
    assert cache.find(dataclasses.replace(block, tokens=(1, 3))) is None
    assert cache.find(dataclasses.replace(block, activation=(("d", 1.0, 0),))) is None


def test_check_finds_a_page_in_two_states() -> None:
    pages = PageAllocator(4, PAGE, PrefixCache())
    held = pages.allocate(2) or []
    pages.check([held])
    with pytest.raises(RuntimeError, match="pages"):
        pages.check([held, held])
    with pytest.raises(RuntimeError, match="pages"):
        pages.check([])
