"""How a request's adapters sit in its sequence: virtual tokens before the prompt, the slots on which each one acts.

A slot is a place in a sequence's pages. Virtual tokens take the first ones; real tokens follow. Where slots and
position ids differ (a prefix that takes no positions), the difference is the same for every real token.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from onebase.adapters.program import Window
from onebase.adapters.traits import Traits

NEVER = sys.maxsize


@dataclass(frozen=True, slots=True)
class Span:
    """Slots [start, stop) on which an adapter acts. at_end: as it does on the last tokens of its window."""

    start: int
    stop: int = NEVER
    at_end: bool = False


Spans = tuple[Span, ...]  # in order, none over another


@dataclass(frozen=True, slots=True)
class Layout:
    """num_virtual: slots before the prompt. num_stored: those whose K and V the adapter brings along (all or none).
    first_position: position id of the first real token. spans: for each adapter the slots on which it acts; everywhere:
    whether that is each slot, for all of them."""

    num_virtual: int = 0
    num_stored: int = 0
    first_position: int = 0
    spans: tuple[Spans, ...] = ()
    everywhere: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "everywhere", all(spans == (Span(0),) for spans in self.spans))

    @classmethod
    def of(cls, prompt: Sequence[int], uses: Sequence[tuple[Traits, float]]) -> Layout:
        """uses: traits and scale of each adapter, in the order of the request. A scale of 0 takes no part."""
        active = [traits for traits, scale in uses if scale != 0 and traits.num_virtual_tokens]
        one = active[0] if active else Traits()
        num_virtual = one.num_virtual_tokens
        spans = tuple(() if scale == 0 else _spans(prompt, traits, num_virtual) for traits, scale in uses)
        return cls(num_virtual, num_virtual if one.stores_prefix else 0, one.first_position, spans)

    @property
    def borders(self) -> list[int]:
        """The slots at which an adapter begins or ends to act, in order."""
        return sorted({at for spans in self.spans for span in spans for at in (span.start, span.stop)})

    def position(self, slot: int) -> int:
        """Position id of the token in a slot."""
        return slot - self.num_virtual + self.first_position


def span_at(spans: Spans, slot: int) -> Span | None:
    """The span that a slot is in."""
    for span in spans:
        if span.start <= slot < span.stop:
            return span
    return None


def _spans(prompt: Sequence[int], traits: Traits, num_virtual: int) -> Spans:
    if traits.window is not None:
        return _in_window(traits.window, num_virtual, len(prompt))
    if not traits.invocation:
        return (Span(0),)
    at = last_match(prompt, traits.invocation)
    return () if at is None else (Span(num_virtual + at),)


def _in_window(window: Window, start: int, length: int) -> Spans:
    """Of a prompt in the slots [start, start + length)."""
    end = start + length
    border = max(start, end - window.last)
    spans = Span(start, min(start + window.first, border)), Span(border, end, at_end=True)
    return tuple(span for span in spans if span.start < span.stop)


def last_match(text: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Where the last occurrence of the pattern starts, None without one. Knuth, Morris and Pratt: linear in both, since
    both come from clients."""
    borders = _borders(pattern)
    found, matched = None, 0
    for at, token in enumerate(text):
        while matched and (matched == len(pattern) or token != pattern[matched]):
            matched = borders[matched - 1]
        matched += token == pattern[matched]
        if matched == len(pattern):
            found = at + 1 - matched
    return found


def _borders(pattern: Sequence[int]) -> list[int]:
    """For each prefix the length of its longest proper prefix that is also its suffix."""
    borders, matched = [0], 0
    for token in pattern[1:]:
        while matched and token != pattern[matched]:
            matched = borders[matched - 1]
        matched += token == pattern[matched]
        borders.append(matched)
    return borders
