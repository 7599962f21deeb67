"""How a request's adapters sit in its sequence: virtual tokens before the prompt, the slot from which each one acts.

A slot is a place in a sequence's pages. Virtual tokens take the first ones; real tokens follow. Where slots and
position ids differ (a prefix that takes no positions), the difference is the same for every real token.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from onebase.adapters.traits import Traits

NEVER = sys.maxsize


@dataclass(frozen=True, slots=True)
class Layout:
    """num_virtual: slots before the prompt. num_stored: those whose K and V the adapter brings along (all or none).
    first_position: position id of the first real token. starts: for each adapter the slot from which it acts, NEVER
    where it acts on none."""

    num_virtual: int = 0
    num_stored: int = 0
    first_position: int = 0
    starts: tuple[int, ...] = ()

    @classmethod
    def of(cls, prompt: Sequence[int], uses: Sequence[tuple[Traits, float]]) -> Layout:
        """uses: traits and scale of each adapter, in the order of the request. A scale of 0 takes no part."""
        active = [traits for traits, scale in uses if scale != 0 and traits.num_virtual_tokens]
        one = active[0] if active else Traits()
        num_virtual = one.num_virtual_tokens
        starts = tuple(NEVER if scale == 0 else _start(prompt, traits, num_virtual) for traits, scale in uses)
        return cls(num_virtual, num_virtual if one.stores_prefix else 0, one.first_position, starts)

    def position(self, slot: int) -> int:
        """Position id of the token in a slot."""
        return slot - self.num_virtual + self.first_position


def _start(prompt: Sequence[int], traits: Traits, num_virtual: int) -> int:
    if not traits.invocation:
        return 0
    at = last_match(prompt, traits.invocation)
    return NEVER if at is None else num_virtual + at


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
