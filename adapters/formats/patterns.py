"""rank_pattern and alpha_pattern: which key of a pattern table speaks for a module.

PEFT takes the first key K, in order, for which ``re.match(rf"(.*\\.)?({K})$", path)``. The keys come from strangers, so
they never meet a backtracking matcher: literal keys are compared, the rest run through ``automaton.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from onebase.adapters.errors import AdapterTooLarge
from onebase.adapters.formats.automaton import Automaton, PatternError, parse_pattern
from onebase.adapters.formats.fields import refused

MAX_KEYS = 8192
MAX_SHAPES = 256
MAX_REGEXES = 32
MAX_KEY_CHARS = 512
_LITERAL = re.compile(r"(\^?)([A-Za-z0-9_.-]+)")


@dataclass(frozen=True, slots=True)
class _Shape:
    """What literal keys of one shape share. A dot in a key is a regular expression's dot: it matches any character."""

    anchored: bool
    length: int
    dots: tuple[int, ...]

    def tail(self, path: str) -> str | None:
        """The end of the path that a key of this shape is compared with, or None where none can match."""
        start = len(path) - self.length
        if start < 0 or (start > 0 and (self.anchored or path[start - 1] != ".")):
            return None
        chars = list(path[start:])
        for at in self.dots:
            chars[at] = "."
        return "".join(chars)


class PatternTable:
    """A {pattern: number} table of the config. Raises AdapterRejected, AdapterTooLarge on building."""

    def __init__(self, field: str, table: Mapping[str, float]) -> None:
        self._field = field
        self._literals: dict[_Shape, dict[str, tuple[int, float]]] = {}  # key -> (order, number)
        self._regexes: list[tuple[str, Automaton, tuple[int, float]]] = []
        self._limit(len(table), MAX_KEYS, "keys")
        for order, (key, number) in enumerate(table.items()):
            self._add(key, (order, number))
        self._limit(len(self._literals), MAX_SHAPES, "shapes of keys")
        self._limit(len(self._regexes), MAX_REGEXES, "keys that are not plain paths")

    def find(self, path: str) -> float | None:
        """The number for a module path, as PEFT would pick it; None where no key matches."""
        hits = [keys[tail] for shape, keys in self._literals.items() if (tail := shape.tail(path)) in keys]
        hits += [hit for key, automaton, hit in self._regexes if self._matches(key, automaton, path)]
        return min(hits)[1] if hits else None

    def _add(self, key: str, hit: tuple[int, float]) -> None:
        self._limit(len(key), MAX_KEY_CHARS, "characters in a key")
        literal = _LITERAL.fullmatch(key)
        if literal:
            anchor, text = literal.groups()
            dots = tuple(at for at, char in enumerate(text) if char == ".")
            self._literals.setdefault(_Shape(bool(anchor), len(text), dots), {})[text] = hit
            return
        self._limit(len(self._regexes), MAX_REGEXES, "keys that are not plain paths")
        try:
            self._regexes.append((key, parse_pattern(key), hit))
        except PatternError as error:
            raise refused(self._field, key, str(error)) from None

    def _matches(self, key: str, automaton: Automaton, path: str) -> bool:
        try:
            return automaton.matches(path)
        except PatternError as error:
            raise refused(self._field, key, str(error)) from None

    def _limit(self, count: int, limit: int, what: str) -> None:
        if count > limit:
            raise AdapterTooLarge(f"{self._field} has {count} {what}; at most {limit} are allowed.", param=self._field)
