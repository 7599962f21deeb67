"""Continuous batching: who runs in the next step, and with how many tokens.

Decodes come first, one token each; what is left of the token budget goes to prefills, in chunks, oldest first.
Pages are taken as sequences grow. When they run out the youngest running sequence is preempted: its pages are freed
and it is computed again later. A waiting sequence whose adapter is not resident holds nobody back.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.sequence import Sequence, Status

Admit = Callable[[Sequence], bool]  # takes references on the sequence's adapters; False where one is not resident
Release = Callable[[Sequence], None]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one sequence computes in a step. samples: its last token is reached, so a new one is drawn."""

    sequence: Sequence
    num_tokens: int
    samples: bool


class Scheduler:
    """Holds waiting and running sequences, both in order of arrival."""

    def __init__(self, pages: PageAllocator, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.pages = pages
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._max_batch_tokens = max_batch_tokens
        self._max_num_seqs = max_num_seqs

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda s: s.order)

    def schedule(self, admit: Admit, release: Release) -> list[Chunk]:
        """The chunks of the next step. ``release`` gives back the adapters of a preempted sequence."""
        chunks: dict[str, Chunk] = {}
        budget = self._max_batch_tokens
        preemptions = self.preemptions
        for sequence in sorted(self.running, key=lambda s: (s.num_uncomputed > 1, s.order)):
            if budget and sequence.status is Status.RUNNING:
                budget -= self._continue(sequence, budget, chunks, release)
        if self.preemptions == preemptions:
            self._admit_waiting(budget, chunks, admit)
        return list(chunks.values())

    def _continue(self, sequence: Sequence, budget: int, chunks: dict[str, Chunk], release: Release) -> int:
        """Give a running sequence its chunk, preempting younger ones for pages. Returns the tokens it takes."""
        num_tokens = min(sequence.num_uncomputed, budget)
        while not self._grow(sequence, sequence.num_computed + num_tokens):
            victim = max(self.running, key=lambda s: s.order)
            chunks.pop(victim.id, None)
            self._preempt(victim, release)
            if victim is sequence:
                return 0
        chunks[sequence.id] = Chunk(sequence, num_tokens, num_tokens == sequence.num_uncomputed)
        return num_tokens

    def _admit_waiting(self, budget: int, chunks: dict[str, Chunk], admit: Admit) -> None:
        """First come, first served: a short sequence does not overtake one that waits for pages."""
        for sequence in list(self.waiting):
            if not budget or len(self.running) >= self._max_num_seqs:
                return
            if self.pages.num_free < self.pages.pages_for(len(sequence.tokens) + 1):
                return
            if admit(sequence):
                self._start(sequence)
                num_tokens = min(sequence.num_uncomputed, budget)
                chunks[sequence.id] = Chunk(sequence, num_tokens, num_tokens == sequence.num_uncomputed)
                budget -= num_tokens

    def _start(self, sequence: Sequence) -> None:
        """Take the pages of the whole prompt at once, so that admitted prompts do not take them from each other."""
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.order)
        sequence.status = Status.RUNNING
        self._grow(sequence, len(sequence.tokens))

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        missing = self.pages.pages_for(num_tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        pages = self.pages.allocate(missing)
        if pages is None:
            return False
        sequence.pages.extend(pages)
        return True

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
        sequence.num_computed = 0

    def check(self) -> None:
        """Prove the book of pages: every held page belongs to exactly one running sequence."""
        self.pages.check()
        held = sum(len(sequence.pages) for sequence in self.running)
        if held + self.pages.num_free != self.pages.num_pages:
            raise RuntimeError(
                f"pages: sequences hold {held}, {self.pages.num_free} of {self.pages.num_pages} are free"
            )
        for sequence in self.running:
            sequence.check(self.pages.page_size)
