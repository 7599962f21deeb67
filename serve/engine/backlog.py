"""The sequences that wait, in lines: one for each priority, tenant and set of adapters, each in order of arrival.

Thousands may wait, and the scheduler asks each step who is next. So nobody goes through all of them: what a step costs
follows from the number of lines whose adapters are on the device, and from how many start.

Who is next: the lowest priority; in it the tenant that was served least; of it the adapters that were served least; of
them the oldest. That nobody starves behind a stream of more urgent requests, every ``AGED``-th start goes to the
priority of whoever has waited longest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from itertools import chain, islice, zip_longest
from math import inf
from typing import Any

from onebase.serve.engine.fairness import Fairness
from onebase.serve.engine.sequence import Sequence

AGED = 16  # starts, one of which goes to the priority of the oldest

Adapters = tuple[str, ...]
# Whether it is not its priority's turn, priority, counters of the tenant and of its adapters, arrival: the least first.
Rank = tuple[bool, int, float, float, int]


@dataclass(slots=True, eq=False)
class Line:
    """Sequences that start in the order in which they came. Never empty but while it is being changed."""

    priority: int
    tenant: str
    digests: Adapters
    sequences: list[Sequence] = field(default_factory=list)

    @property
    def head(self) -> Sequence:
        return self.sequences[0]

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands among the lines of its tenant."""
        return self.priority, self.head.order


class Backlog:
    """All that wait. Those that were set aside are among them, but in no line until they are brought back."""

    def __init__(self, fairness: Fairness) -> None:
        self._starts = 0  # since one of the priority of the oldest
        self._fairness = fairness
        self._lines: dict[tuple[int, str, Adapters], Line] = {}
        self._over: dict[str, dict[Line, None]] = {}  # first adapter -> lines; "": those of the base
        self._loading: dict[str, list[tuple[tuple[int, int], Line]]] = {}  # tenant -> lines over adapters, by place
        self._aside: dict[Sequence, None] = {}
        self._adapters: Counter[Adapters] = Counter()
        self._tenants: Counter[str] = Counter()
        self._priorities: Counter[int] = Counter()

    def __len__(self) -> int:
        return sum(self._adapters.values())

    def __bool__(self) -> bool:
        return bool(self._adapters)

    def __iter__(self) -> Iterator[Sequence]:
        """Everybody, in order of arrival. Goes through all of them: not for every step."""
        everybody = chain(self._aside, *(line.sequences for line in self._lines.values()))
        return iter(sorted(everybody, key=lambda sequence: sequence.order))

    @property
    def adapters(self) -> Counter[Adapters]:
        """How many wait, by their adapters."""
        return self._adapters

    @property
    def aside(self) -> Collection[Sequence]:
        """Those that are in no line."""
        return self._aside.keys()

    @property
    def tenants(self) -> Collection[str]:
        """Who waits."""
        return self._tenants.keys()

    @property
    def priority(self) -> int:
        """The most urgent one that waits; somebody does."""
        return min(self._priorities)

    def add(self, sequence: Sequence) -> None:
        """One that came, or comes back from running: it keeps its place by arrival."""
        self._count(sequence, 1)
        self._line_up(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It starts, or ends. KeyError or ValueError where it does not wait."""
        if sequence in self._aside:
            del self._aside[sequence]
        else:
            self._step_out(sequence)
        self._count(sequence, -1)

    def _count(self, sequence: Sequence, change: int) -> None:
        request = sequence.request
        _change(self._adapters, sequence.digests, change)
        _change(self._tenants, request.tenant, change)
        _change(self._priorities, request.priority, change)

    def set_aside(self, sequence: Sequence) -> None:
        """It waits for something else than its turn."""
        self._step_out(sequence)
        self._aside[sequence] = None

    def bring_back(self, sequence: Sequence) -> None:
        """Into its line. One that has left meanwhile stays where it is."""
        if sequence in self._aside:
            del self._aside[sequence]
            self._line_up(sequence)

    def longest_waiting(self, count: int) -> list[Sequence]:
        """Up to ``count`` sequences over distinct adapters, whose turn comes first: of each tenant in turn its next
        one, the tenant first that has waited longest. This order changes only as somebody starts, comes or goes."""
        if not self._loading:
            return []
        tenants = sorted(self._loading.values(), key=lambda lines: lines[0][0])
        rows = zip_longest(*(islice(lines, count) for lines in tenants))
        in_turn = (entry[1].head for row in rows for entry in row if entry is not None)
        return list(islice(in_turn, count))

    def offer(
        self, ready: Collection[str] | None, tenants: Collection[str] | None = None, *, claims: bool = False
    ) -> Offer:
        """Who could start now: lines whose adapters are all ``ready`` (None: whatever adapters), of these tenants.

        claims: no seat is free. The turn of the oldest waits for one: it has no claim by its age."""
        lines = self._ready_lines(ready)
        offered = [line for line in lines if tenants is None or line.tenant in tenants]
        return Offer(offered, self._fairness, self._started, aged=not claims and self._starts >= AGED - 1)

    def _started(self, *, aged: bool) -> None:
        self._starts = 0 if aged else self._starts + 1

    def _ready_lines(self, ready: Collection[str] | None) -> list[Line]:
        if ready is None or len(self._over) <= len(ready):
            over = [line for lines in self._over.values() for line in lines]
        else:
            over = [line for digest in ("", *ready) for line in self._over.get(digest, ())]
        return [line for line in over if ready is None or all(digest in ready for digest in line.digests)]

    def _line_up(self, sequence: Sequence) -> None:
        request, digests = sequence.request, sequence.digests
        key = request.priority, request.tenant, digests
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line(*key)
            self._over.setdefault(digests[0] if digests else "", {})[line] = None
        else:
            self._unlist(line)
        insort(line.sequences, sequence, key=lambda one: one.order)
        self._list(line)

    def _step_out(self, sequence: Sequence) -> None:
        request, digests = sequence.request, sequence.digests
        key = request.priority, request.tenant, digests
        line = self._lines[key]
        self._unlist(line)
        at = bisect_left(line.sequences, sequence.order, key=lambda one: one.order)
        if line.sequences[at : at + 1] != [sequence]:
            raise ValueError(f"{sequence.id} does not wait")
        del line.sequences[at]
        if line.sequences:
            return self._list(line)
        del self._lines[key]
        first = digests[0] if digests else ""
        del self._over[first][line]
        if not self._over[first]:
            del self._over[first]
        return None

    def _list(self, line: Line) -> None:
        if line.digests:
            insort(self._loading.setdefault(line.tenant, []), (line.place, line))

    def _unlist(self, line: Line) -> None:
        if not line.digests:
            return
        listed = self._loading[line.tenant]
        del listed[bisect_left(listed, line.place, key=lambda entry: entry[0])]
        if not listed:
            del self._loading[line.tenant]

    def check(self) -> None:
        """Prove that lines, what is set aside and the counts agree. Raises RuntimeError where they do not."""
        counted = Counter(sequence.digests for sequence in self)
        lines = {line for lines in self._over.values() for line in lines}
        listed = {line for entries in self._loading.values() for _, line in entries}
        if (
            counted != self._adapters
            or not len(self) == self._tenants.total() == self._priorities.total()
            or lines != set(self._lines.values())
        ):
            raise RuntimeError(f"backlog: {sum(counted.values())} sequences in {len(lines)} lines, counted {len(self)}")
        if listed != {line for line in lines if line.digests} or not all(line.sequences for line in lines):
            raise RuntimeError(f"backlog: {len(listed)} lines over adapters are listed")


class Offer:
    """Who could start in one step, one after the other. Counters rise while it is gone through.

    aged: the first one is to be of the priority of the oldest. told: of each start. Lines are ranked one priority after
    the other, as far as it is gone through: clients choose how many priorities there are.
    """

    def __init__(self, lines: list[Line], fairness: Fairness, told: Callable[..., None], *, aged: bool) -> None:
        self._fairness = fairness
        self._told = told
        oldest = min(lines, key=lambda line: line.head.order) if aged and lines else None
        self._turn = None if oldest is None else oldest.priority
        self._heap: list[tuple[Rank, Line]] = []
        self._later: list[Line] = []  # not ranked yet, those that come first at the end
        self._put_off(lines)

    def peek(self) -> tuple[Rank, Sequence] | None:
        """The next one, and its rank; None where there is nobody."""
        while self._heap or self._later:
            if not self._heap:
                self._go_on()
            rank, line = self._heap[0]
            if not line.sequences:
                heappop(self._heap)
                continue
            now = self._rank(line)
            if now <= rank:
                return now, line.head
            heapreplace(self._heap, (now, line))
        return None

    def _go_on(self) -> None:
        """To the lines of the next priority."""
        turn = self._turn_of(self._later[-1])
        while self._later and self._turn_of(self._later[-1]) == turn:
            line = self._later.pop()
            self._heap.append((self._rank(line), line))
        heapify(self._heap)

    def skip(self) -> None:
        """Nobody of the next one's line starts in this step."""
        heappop(self._heap)

    def started(self) -> None:
        """The next one did."""
        aged, self._turn = self._turn is not None, None
        self._told(aged=aged)
        if aged:
            ranked, self._heap = self._heap, []
            self._put_off(self._later + [line for _, line in ranked if line.sequences])

    def _put_off(self, lines: list[Line]) -> None:
        self._later = sorted(lines, key=self._turn_of, reverse=True)

    def _turn_of(self, line: Line) -> float:
        return -inf if line.priority == self._turn else line.priority

    def _rank(self, line: Line) -> Rank:
        return (line.priority != self._turn, line.priority, *self._fairness.served(line.head), line.head.order)


def _change(counts: Counter[Any], key: object, change: int) -> None:
    counts[key] += change
    if not counts[key]:
        del counts[key]
