"""Where a request's adapters sit in its sequence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.adapters.program import Window
from onebase.adapters.tiers.entry import Entry, State
from onebase.adapters.traits import Traits
from onebase.serve.engine.layout import Layout, Span, last_match
from onebase.serve.engine.messages import AdapterUse, Request, SamplingParams
from onebase.serve.engine.sequence import Sequence

SOFT = Traits(num_virtual_tokens=5, first_position=5)
STORED = Traits(num_virtual_tokens=5, first_position=0, stores_prefix=True)
ACTIVATED = Traits(invocation=(7, 8))
PROMPT = (1, 7, 8, 2, 7, 8, 3)


@given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), min_size=1, max_size=6))
def test_the_last_match_is_the_last(text: list[int], pattern: list[int]) -> None:
    starts = [at for at in range(len(text)) if text[at : at + len(pattern)] == pattern]
    assert last_match(text, pattern) == (starts[-1] if starts else None)


def _sequence(*uses: tuple[Traits, float]) -> Sequence:
    adapters = tuple(AdapterUse(f"d{at}", "", scale) for at, (_, scale) in enumerate(uses))
    sequence = Sequence.of(Request("r", PROMPT, SamplingParams(), adapters), 0)
    if uses:
        entries = (Entry(f"d{at}", "", State.READY, handle=10 + at, tail=20 + at) for at in range(len(uses)))
        sequence.adapters = tuple(entries)
        sequence.lay_out(Layout.of(PROMPT, uses))
    return sequence


def test_a_soft_prompt_takes_slots_and_positions() -> None:
    sequence = _sequence((SOFT, 1.0))
    assert sequence.tokens == [-1, -2, -3, -4, -5, *PROMPT]
    assert [sequence.placed.position(slot) for slot in (0, 4, 5)] == [0, 4, 5]
    assert (sequence.num_computed, list(sequence.uncopied), sequence.num_generated) == (0, [], 0)
    assert sequence.prompt_tokens(0, 100) == len(PROMPT)
    assert sequence.prompt_tokens(3, 7) == 2


def test_stored_keys_are_copied_and_not_computed() -> None:
    sequence = _sequence((STORED, 1.0))
    assert (sequence.num_computed, list(sequence.uncopied)) == (5, [0, 1, 2, 3, 4])
    assert sequence.placed.position(5) == 0
    sequence.reuse(3)
    assert (sequence.num_computed, list(sequence.uncopied)) == (5, [3, 4])
    sequence.num_computed = 6
    assert not sequence.uncopied
    sequence.restart()
    assert (sequence.num_computed, list(sequence.uncopied)) == (5, [0, 1, 2, 3, 4])


def test_an_activated_adapter_acts_from_its_last_invocation_on() -> None:
    sequence = _sequence((ACTIVATED, 0.5), (Traits(), 2.0))
    assert sequence.placed.spans == ((Span(4),), (Span(0),))
    both, one = ((10, 0.5), (11, 2.0)), ((11, 2.0),)
    assert sequence.runs(0, 7) == [(4, one), (3, both)]
    assert sequence.runs(4, 6) == [(2, both)]
    assert sequence.runs(1, 4) == [(3, one)]


def test_virtual_tokens_push_the_activation_back() -> None:
    sequence = _sequence((SOFT, 1.0), (ACTIVATED, 1.0))
    assert sequence.placed.spans == ((Span(0),), (Span(9),))


def test_an_adapter_that_is_not_invoked_or_has_no_scale_takes_no_part() -> None:
    sequence = _sequence((Traits(invocation=(9,)), 1.0), (SOFT, 0.0))
    assert sequence.placed.spans == ((), ())
    assert sequence.tokens == list(PROMPT)
    assert sequence.runs(0, 7) == [(7, ())]
    assert not sequence.block(0, 4).activation


def test_a_window_is_counted_from_both_ends_of_the_prompt() -> None:
    sequence = _sequence((SOFT, 1.0), (Traits(window=Window(2, 3)), 0.5))
    assert sequence.placed.spans == ((Span(0),), (Span(5, 7), Span(9, 12, at_end=True)))
    soft, first, last = (10, 1.0), (11, 0.5), (21, 0.5)
    assert sequence.runs(3, 7) == [(2, (soft,)), (2, (soft, first))]
    assert sequence.runs(8, 15) == [(1, (soft,)), (3, (soft, last)), (3, (soft,))]
    assert sequence.uses_at(11) == (soft, last)
    assert sequence.uses_at(12) == (soft,), "no generated token is in it"


@pytest.mark.parametrize(
    ("window", "spans"),
    [
        (Window(5, 4), (Span(0, 3), Span(3, 7, at_end=True))),
        (Window(9, 0), (Span(0, 7),)),
        (Window(2, 9), (Span(0, 7, at_end=True),)),
        (Window(0, 1), (Span(6, 7, at_end=True),)),
    ],
)
def test_where_the_ends_of_a_window_overlap_the_last_counts(window: Window, spans: tuple[Span, ...]) -> None:
    assert _sequence((Traits(window=window), 1.0)).placed.spans == (spans,)


def test_pages_near_the_end_of_a_prompt_are_those_of_its_length() -> None:
    blocks = []
    for times in (2, 3):
        sequence = Sequence.of(Request("r", PROMPT * times, SamplingParams(), (AdapterUse("d", ""),)), 0)
        sequence.lay_out(Layout.of(sequence.request.prompt, [(Traits(window=Window(2, 3)), 1.0)]))
        blocks.append([sequence.block(index, 7) for index in range(2)])
    short, long = blocks
    assert short[0] == long[0]
    assert short[0].activation == (("d", 1.0, 0, 2, False),)
    assert short[1].activation == (("d", 1.0, 4, 7, True),)
    assert (long[1].activation, long[1].tokens) == ((), short[1].tokens)


def test_what_a_page_holds_is_told_by_tokens_and_activation() -> None:
    uses = [(), ((ACTIVATED, 0.5),), ((ACTIVATED, 0.25),), ((Traits(), 0.5),), ((SOFT, 1.0),)]
    early = [_sequence(*use).block(0, 4) for use in uses]
    assert early[0] == early[1] == early[2], "before the invocation rows are the base's"
    assert len({block.key for block in early}) == 3
    crossing = [_sequence(*use).block(0, 6) for use in uses]
    assert len({block.key for block in crossing}) == len(uses)
    assert crossing[1].activation == (("d0", 0.5, 4, 6, False),)
    assert _sequence().block(1, 3).parent == _sequence().block(0, 3).key
