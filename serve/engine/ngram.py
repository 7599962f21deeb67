"""Prompt lookup: what followed the latest tokens when they came last. Drafts without a model (arXiv:2304.04487)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Many
from itertools import cycle, islice

WINDOW = 8192  # tokens that are looked through: it bounds the search, and clients choose what is searched
_SIZE = array("i").itemsize


class Lookup:
    """The tokens of one sequence, kept as bytes so that each step's search is one call."""

    def __init__(self) -> None:
        self._data = bytearray()

    def catch_up(self, tokens: Many[int], first: int = 0) -> None:
        """tokens: from ``first`` on, those known so far and, after them, new ones."""
        self._data += array("i", tokens[first + len(self._data) // _SIZE :]).tobytes()

    def propose(self, most: int, least_match: int, most_match: int) -> tuple[int, ...]:
        """``most`` tokens that followed the latest earlier place of the last tokens; of as many of them as match, from
        most_match down to least_match. Where that place is nearer than ``most``, what lies between repeats. Empty where
        there is no such place."""
        data = bytes(self._data[-WINDOW * _SIZE :])
        for length in range(min(most_match, len(data) // _SIZE - 1), least_match - 1, -1):
            at = _last(data, data[-length * _SIZE :])
            if at >= 0:
                start = at + length * _SIZE
                return tuple(islice(cycle(array("i", data[start : start + most * _SIZE])), most))
        return ()


def _last(data: bytes, pattern: bytes) -> int:
    """Where the pattern comes last before the end of ``data``, at the border of a token; -1 where it does not."""
    at = data.rfind(pattern, 0, len(data) - 1)
    while at % _SIZE and at >= 0:
        at = data.rfind(pattern, 0, at + len(pattern) - 1)
    return at
