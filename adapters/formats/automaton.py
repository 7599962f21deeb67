"""A regular expression matcher that cannot backtrack: Thompson's construction, run as sets of states.

Covers what rank patterns use (literals, ``.``, classes, groups, alternation, ``* + ? {m,n}``, ``^``, ``$``) and agrees
with ``re.match(rf"(.*\\.)?({pattern})$", path)`` on it. Anything else is refused, so time is O(path * states).
See Cox, "Regular Expression Matching Can Be Simple And Fast" (2007).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_STATES = 500
MAX_WORK = 200_000  # states visited on moves not seen before: real patterns visit a few hundred
MAX_REPEAT = 64

_ATOM = re.compile(
    r"\\[dDsSwW]|\\[^A-Za-z0-9]|\[\^?(?:(?!--)[^\]\[\\&|~]|\\[^A-Za-z0-9]|\\[dDsSwW])+\]|[^\\\[\]{}()*+?|^$]"
)
_REPEAT = re.compile(r"(?:([*+?])|\{(\d{1,3})(,(\d{0,3}))?\})\??")


class PatternError(ValueError):
    """The pattern is no regular expression, or uses what is not served. The message says which."""


@dataclass(slots=True)
class Automaton:
    """States are indices. A state has free moves, one guarded move (a single-character pattern), or an anchor."""

    free: list[list[int]] = field(default_factory=list)
    guards: list[tuple[re.Pattern[str], int] | None] = field(default_factory=list)
    anchors: list[str] = field(default_factory=list)  # "" or "^" or "$": free moves open only there
    start: int = 0
    accept: int = 0
    work: int = 0
    moves: dict[tuple[frozenset[int], str, bool], frozenset[int]] = field(default_factory=dict)

    def state(self, anchor: str = "") -> int:
        if len(self.free) >= MAX_STATES:
            raise PatternError(f"the pattern expands to over {MAX_STATES} states")
        self.free.append([])
        self.guards.append(None)
        self.anchors.append(anchor)
        return len(self.free) - 1

    def matches(self, path: str) -> bool:
        """Whether the pattern matches the path, or its tail behind a dot. PatternError where it costs too much."""
        current = self._closure({self.start}, at_start=True, at_end=not path)
        for index, char in enumerate(path):
            move = (current, char, index == len(path) - 1)
            following = self.moves.get(move)
            if following is None:
                following = self.moves[move] = self._after(*move)
            current = following
        return self.accept in current

    def _after(self, current: frozenset[int], char: str, at_end: bool) -> frozenset[int]:
        guards = [guard for state in current if (guard := self.guards[state])]
        following = {target for pattern, target in guards if pattern.fullmatch(char)}
        if char == ".":
            following.add(self.start)  # the optional prefix (.*\.)? may end here
        return self._closure(following, at_start=False, at_end=at_end)

    def _closure(self, states: set[int], *, at_start: bool, at_end: bool) -> frozenset[int]:
        seen, waiting = set(states), list(states)
        while waiting:
            state = waiting.pop()
            self.work += 1
            anchor = self.anchors[state]
            if (anchor == "^" and not at_start) or (anchor == "$" and not at_end):
                continue
            fresh = {target for target in self.free[state] if target not in seen}
            seen |= fresh
            waiting.extend(fresh)
        if self.work > MAX_WORK:
            raise PatternError("the pattern takes too long to match")
        return frozenset(seen)


def parse_pattern(pattern: str) -> Automaton:
    """Build the automaton. Raises PatternError, and nothing else, in time linear in the states."""
    try:
        automaton = _Parser(pattern).build()
        re.compile(pattern)
    except re.error as error:
        raise PatternError(f"the pattern is no regular expression ({error})") from None
    except RecursionError:
        raise PatternError("the pattern nests too deep") from None
    return automaton


class _Parser:
    """Recursive descent. Each rule returns (entry, exit) states of the part that it read."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.automaton = Automaton()

    def build(self) -> Automaton:
        self.automaton.start, self.automaton.accept = self._alternatives()
        if self.at != len(self.pattern):
            raise self._unserved()
        return self.automaton

    def _alternatives(self) -> tuple[int, int]:
        entry, end = self.automaton.state(), self.automaton.state()
        while True:
            first, last = self._sequence()
            self.automaton.free[entry].append(first)
            self.automaton.free[last].append(end)
            if self._peek() != "|":
                return entry, end
            self.at += 1

    def _sequence(self) -> tuple[int, int]:
        entry = end = self.automaton.state()
        while self._peek() not in ("", "|", ")"):
            first, last = self._repeated()
            self.automaton.free[end].append(first)
            end = last
        return entry, end

    def _repeated(self) -> tuple[int, int]:
        begin = self.at
        entry, end = self._item()
        match = _REPEAT.match(self.pattern, self.at)
        if match is None:
            return entry, end
        if self.pattern[begin] in "^$":
            raise self._unserved()
        stop = match.end()
        low, high = _bounds(match)
        first = end = self.automaton.state()
        for count in range(max(low, high or 0, 1)):
            self.at = begin
            entry, last = self._item()
            self.automaton.free[end].append(entry)
            end = self._link(count, low, high, entry, last, end)
        self.at = stop
        return first, end

    def _link(self, count: int, low: int, high: int | None, entry: int, last: int, before: int) -> int:
        """Join one copy of a repeated item; the copies beyond ``low`` can be skipped, the last may loop."""
        joined = self.automaton.state()
        self.automaton.free[last].append(joined)
        if count >= low:
            self.automaton.free[before].append(joined)
        if high is None and count >= low - 1:
            self.automaton.free[last].append(entry)
        if high == 0:
            self.automaton.free[before].remove(entry)
        return joined

    def _item(self) -> tuple[int, int]:
        char = self._peek()
        if char and char in "^$":
            self.at += 1
            entry, end = self.automaton.state(char), self.automaton.state()
            self.automaton.free[entry].append(end)
            return entry, end
        if char == "(":
            return self._group()
        return self._atom()

    def _group(self) -> tuple[int, int]:
        self.at += 3 if self.pattern.startswith("(?:", self.at) else 1
        if self._peek() == "?":
            raise self._unserved()
        inner = self._alternatives()
        if self._peek() != ")":
            raise PatternError("the pattern has an unclosed group")
        self.at += 1
        return inner

    def _atom(self) -> tuple[int, int]:
        match = _ATOM.match(self.pattern, self.at)
        if match is None:
            raise self._unserved()
        self.at = match.end()
        entry, end = self.automaton.state(), self.automaton.state()
        self.automaton.guards[entry] = (re.compile(match.group()), end)
        return entry, end

    def _peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def _unserved(self) -> PatternError:
        rest = self.pattern[self.at : self.at + 20]
        return PatternError(
            f"the pattern uses what is not served at {rest!r}: literals, . classes, groups, | * + ? {{m,n}} ^ $ are"
        )


def _bounds(match: re.Match[str]) -> tuple[int, int | None]:
    symbol, low, comma, high = match.groups()
    if symbol:
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[symbol]
    upper = None if comma and not high else int(high or low)
    if max(int(low), upper or 0) > MAX_REPEAT or (upper is not None and upper < int(low)):
        raise PatternError(f"the pattern repeats over {MAX_REPEAT} times, or its bounds are swapped")
    return int(low), upper
