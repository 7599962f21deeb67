"""Continuous batching: who runs in the next step, and with how many tokens.

Decodes come first, one token each; what is left of the token budget goes to prefills, in chunks, oldest first.
Pages are taken as sequences grow. When they run out the youngest running sequence is preempted: its pages are freed
and it is computed again later, as far as the prefix cache does not still hold them. A waiting sequence whose adapter is
not resident holds nobody back: pages are kept for the oldest of those that could start.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.sequence import Sequence, Status

MayStart = Callable[[Sequence], bool]  # whether its adapters are there; changes nothing
Take = Callable[[Sequence], None]  # takes references on the adapters of one that starts
Release = Callable[[Sequence], None]  # gives them back


class Room(Enum):
    """Whether there are pages: true where there are now."""

    NOW = "now"
    SOON = "soon"  # what lies in their place is moving away, step by step
    NONE = "none"

    def __bool__(self) -> bool:
        return self is Room.NOW


MorePages = Callable[[int], Room]  # makes so many more pages free, if it can


def _no_more(count: int) -> Room:
    return Room.NONE


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one sequence computes in a step. samples: its last token is reached, so a new one is drawn. start: its first
    slot, the first that was not computed when the chunk was made."""

    sequence: Sequence
    num_tokens: int
    samples: bool
    start: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.sequence.num_computed)

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


class Scheduler:
    """Holds waiting and running sequences, both in order of arrival.

    more_pages: asked before a sequence is preempted or not admitted for want of pages. Where there will be some soon,
    a running sequence sits the step out.
    """

    def __init__(self, pages: PageAllocator, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.pages = pages
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.more_pages: MorePages = _no_more
        self.preemptions = 0
        self.queried_tokens = 0  # of prompts, looked for in the prefix cache
        self.cached_tokens = 0  # of them, found there
        self._max_batch_tokens = max_batch_tokens
        self._max_num_seqs = max_num_seqs

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda s: s.order)

    def schedule(self, may_start: MayStart, take: Take, release: Release) -> list[Chunk]:
        """The chunks of the next step. Sequences are admitted with ``take``, and preempted with ``release``."""
        chunks: dict[str, Chunk] = {}
        budget = self._max_batch_tokens
        preemptions, all_go_on = self.preemptions, True
        for sequence in sorted(self.running, key=lambda s: (s.num_uncomputed > 1, s.order)):
            if budget and sequence.status is Status.RUNNING:
                num_tokens = self._continue(sequence, budget, chunks, release)
                budget, all_go_on = budget - num_tokens, all_go_on and num_tokens > 0
        if all_go_on and self.preemptions == preemptions:
            self._admit_waiting(budget, chunks, may_start, take)
        return list(chunks.values())

    def _continue(self, sequence: Sequence, budget: int, chunks: dict[str, Chunk], release: Release) -> int:
        """Give a running sequence its chunk, preempting younger ones for pages. Returns the tokens it takes, 0 for
        none."""
        num_tokens = min(sequence.num_uncomputed, budget)
        while not (room := self._grow(sequence, sequence.num_computed + num_tokens)):
            if room is Room.SOON:
                return 0
            victim = max(self.running, key=lambda s: s.order)
            chunks.pop(victim.id, None)
            self._preempt(victim, release)
            if victim is sequence:
                return 0
        chunks[sequence.id] = Chunk(sequence, num_tokens, num_tokens == sequence.num_uncomputed)
        return num_tokens

    def _admit_waiting(self, budget: int, chunks: dict[str, Chunk], may_start: MayStart, take: Take) -> None:
        """First come, first served among those that may start: a short one does not overtake one that waits for pages,
        and one that waits for its adapter asks for none."""
        for sequence in list(self.waiting):
            if not budget or len(self.running) >= self._max_num_seqs:
                return
            if not may_start(sequence):
                continue
            if not self._has_room(sequence):
                return
            take(sequence)
            self._start(sequence)
            num_tokens = min(sequence.num_uncomputed, budget)
            chunks[sequence.id] = Chunk(sequence, num_tokens, num_tokens == sequence.num_uncomputed)
            budget -= num_tokens

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether its tokens and the next one fit the pages, with those that the prefix cache has."""
        next_token = min(sequence.request.sampling.max_tokens, 1)
        count = self.pages.pages_for(len(sequence.tokens) + next_token)
        if self.pages.can_hold(count, ()):
            return True
        cached = self._cached(sequence)
        return self.pages.can_hold(count, cached) or bool(self.more_pages(self.pages.lacking(count, cached)))

    def _cached(self, sequence: Sequence) -> list[int]:
        """The pages that the prefix cache has for it."""
        if self.pages.cache is None or sequence.layout is None:
            return []
        most = sequence.num_reusable // self.pages.page_size
        return self.pages.find(sequence.block(index, self.pages.page_size) for index in range(most))

    def _start(self, sequence: Sequence) -> None:
        """Take the pages of the whole prompt at once, so that admitted prompts do not take them from each other."""
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.order)
        sequence.status = Status.RUNNING
        sequence.pages = self._cached(sequence)
        self.pages.share(sequence.pages)
        sequence.reuse(len(sequence.pages) * self.pages.page_size)
        if self.pages.cache is not None and sequence.num_reusable:
            self.queried_tokens += len(sequence.request.prompt)
            self.cached_tokens += sequence.num_cached_prompt
        self._grow(sequence, len(sequence.tokens))

    def computed(self, chunk: Chunk) -> None:
        """A chunk's K and V are in its pages now; those that it filled can be found by others."""
        sequence, page_size = chunk.sequence, self.pages.page_size
        copied, first, stop = sequence.uncopied, chunk.start, chunk.stop
        sequence.num_computed = stop
        if self.pages.cache is None:
            return
        first = copied.start if copied else first  # stored K and V were copied beside it
        for index in range(first // page_size, stop // page_size):
            self.pages.cache.add(sequence.pages[index], sequence.block(index, page_size))

    def _grow(self, sequence: Sequence, num_tokens: int) -> Room:
        missing = self.pages.pages_for(num_tokens) - len(sequence.pages)
        if missing <= 0:
            return Room.NOW
        pages = self.pages.allocate(missing)
        if pages is None:
            room = self.more_pages(missing - self.pages.num_free)
            pages = self.pages.allocate(missing) if room else None
            if pages is None:
                return room
        sequence.pages.extend(pages)
        return Room.NOW

    def _preempt(self, sequence: Sequence, release: Release) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        release(sequence)
        sequence.status = Status.WAITING
        self.add(sequence)
        self.preemptions += 1

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages."""
        (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)
        self._free(sequence)
        sequence.status = Status.FINISHED

    def _free(self, sequence: Sequence) -> None:
        self.pages.free(sequence.pages)
        sequence.pages.clear()
        if sequence.layout is not None:
            sequence.restart()

    def withdraw(self, count: int, most_moves: int) -> dict[int, int]:
        """Give up the lowest pages, see PageAllocator.withdraw. The caller copies what moved, old -> new."""
        moves = self.pages.withdraw(count, most_moves)
        for sequence in self.running if moves else ():
            sequence.pages = [moves.get(page, page) for page in sequence.pages]
        return moves

    def check(self) -> None:
        """Prove the book of pages: every held page is held by running sequences, and by as many as are counted."""
        self.pages.check([sequence.pages for sequence in self.running])
        for sequence in self.running:
            sequence.check(self.pages.page_size)
