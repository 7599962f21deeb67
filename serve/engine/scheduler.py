"""Continuous batching: who runs in the next step, and with how many tokens.

Decodes come first, one token each, but for those that sit the step out for a prompt (courtesy.py). What is left goes to
prompts, in chunks: those that run and those that wait, in the order of fairness (backlog.py), as far as the token
budget and the pace (pace.py) go. Pages are taken as sequences grow.
When they run out a running sequence is preempted (victims.py): its pages are freed and it is computed again later, as
far as the prefix cache does not still hold them. A waiting sequence whose adapter is not resident holds nobody back:
pages are kept for the first of those that could start.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum

from onebase.serve.engine.backlog import AGED, Backlog, Offer, Rank
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.courtesy import Courtesy
from onebase.serve.engine.fairness import Fairness
from onebase.serve.engine.pace import Pace
from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.recovery import TokenLimit
from onebase.serve.engine.sequence import Sequence, Status
from onebase.serve.engine.shared_prefixes import Prefixes
from onebase.serve.engine.victims import Victims

MOST_FOLLOWERS = 16  # that are set aside in one step

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


@dataclass(slots=True)
class _Step:
    """A step that is being scheduled. budget: tokens that it still may compute. calm: everybody who runs went on.

    claimed: somebody had to give way to a waiting sequence. followers: how many were set aside. over: tenants with more
    than their share of the seats when it began, where there are others. for_prompts: tokens that prompts may have.
    """

    may_start: MayStart
    take: Take
    release: Release
    budget: int
    chunks: dict[str, Chunk] = field(default_factory=dict)
    calm: bool = True
    claimed: bool = False
    followers: int = 0
    over: Collection[str] = ()
    for_prompts: int = 0


class Scheduler:
    """Holds waiting and running sequences. ``running`` is in order of arrival.

    more_pages: asked before a sequence is preempted or not admitted for want of pages. Where there will be some soon,
    a running sequence sits the step out. ready: adapters that are on the device; None: whichever.
    """

    def __init__(
        self,
        pages: PageAllocator,
        max_batch_tokens: int,
        max_num_seqs: int,
        fairness: Fairness | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.pages = pages
        self.fairness = fairness or Fairness()
        self.pace = pace or Pace(0.0)
        self.waiting = Backlog(self.fairness)
        self.running: list[Sequence] = []
        self.more_pages: MorePages = _no_more
        self.ready: Collection[str] | None = None
        self.preemptions = 0
        self.queried_tokens = 0  # of prompts, looked for in the prefix cache
        self.cached_tokens = 0  # of them, found there
        self._prefixes = Prefixes(pages)
        self._victims = Victims(self.fairness, pages, max_num_seqs)
        self._courtesy = Courtesy(self.fairness, max_num_seqs)
        self.limit = TokenLimit(max_batch_tokens)
        self._max_num_seqs = max_num_seqs
        self._passed_over = 0  # steps in a row in which prompts that were begun got nothing

    def add(self, sequence: Sequence) -> None:
        """One that has arrived. While it awaits its grammar it stands in nobody's way."""
        self.fairness.enter(sequence)
        self.waiting.add(sequence)
        if sequence.awaits_grammar:
            self.waiting.set_aside(sequence)

    # The next step

    def schedule(self, may_start: MayStart, take: Take, release: Release) -> list[Chunk]:
        """The chunks of the next step. Sequences are admitted with ``take``, and preempted with ``release``."""
        step = _Step(may_start, take, release, self.limit.now)
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            count = sequence.num_uncomputed
            if count:
                (decoding if count == 1 else prefilling).append(sequence)
        if prefilling or self.waiting:
            self._share(decoding, prefilling, step)
        else:
            self._decode(decoding, step)
        return list(step.chunks.values())

    def _share(self, decoding: list[Sequence], prefilling: list[Sequence], step: _Step) -> None:
        """Of a step that has prompts as well, or may have. The time of those who sit it out is theirs; where nobody
        takes it, they do not."""
        step.over = self._courtesy.over(self.running)
        going_on = self._courtesy.going_on(decoding, prefilling, step.over, lambda: self._next_one(step))
        self._decode(going_on, step)
        num_decoding, budget = len(step.chunks), step.budget
        seats = max(0, self._max_num_seqs - len(self.running))
        num_prompts = len(prefilling) + min(len(self.waiting), seats)
        step.budget = self.pace.allowance(num_decoding, num_prompts, budget, len(decoding) - len(going_on))
        step.for_prompts = step.budget
        self._prefill_oldest(prefilling, step)
        self._prefill(prefilling, step)
        left_out = any(sequence.status is Status.RUNNING for sequence in prefilling)
        self._passed_over = self._passed_over + 1 if left_out else 0
        if len(going_on) < len(decoding) and step.budget == step.for_prompts:  # prompts alone lower it here
            step.budget = budget
            self._decode([one for one in decoding if one.id not in step.chunks], step)

    def _next_one(self, step: _Step) -> Sequence | None:
        """Who would start first, if it may."""
        offer = self._offer()
        first = None if offer is None else offer.peek()
        return first[1] if first is not None and step.may_start(first[1]) else None

    def _decode(self, decoding: list[Sequence], step: _Step) -> None:
        """One token for each, as far as tokens and pages go."""
        size = self.pages.page_size
        for sequence in decoding:
            if not step.budget or sequence.status is not Status.RUNNING:
                continue
            if sequence.num_computed < size * len(sequence.pages):  # what _continue would find, at a third of its price
                self._give(sequence, 1, step, samples=True)
            else:
                self._continue(sequence, step)

    def _prefill_oldest(self, prefilling: list[Sequence], step: _Step) -> None:
        """Where more urgent prompts leave nothing to those that are begun: the oldest goes first, every ``AGED``-th
        step."""
        if step.budget and self._passed_over >= AGED:
            self._passed_over = 0
            going = next((one for one in prefilling if one.status is Status.RUNNING), None)
            if going is not None:
                prefilling.remove(going)
                self._continue(going, step)

    def _prefill(self, prefilling: list[Sequence], step: _Step) -> None:
        """Chunks of prompts, those that are begun and those that wait, as far as the step has room for them."""
        offer = self._offer() if step.calm and step.budget else None
        while step.budget:
            begun = (one for one in prefilling if one.status is Status.RUNNING)
            going = min(begun, key=lambda one: self._rank(one, step), default=None)
            first = None if offer is None or not step.calm else offer.peek()
            if going is not None and (first is None or self._rank(going, step) <= first[0]):
                prefilling.remove(going)
                self._continue(going, step)
            elif offer is not None and first is not None:
                offer = offer if self._admit(first[1], offer, step) else None
            else:
                return

    def _rank(self, sequence: Sequence, step: _Step) -> Rank:
        """Of a prompt that is begun: before those of its tenant that wait."""
        served = self._courtesy.served(sequence, step.over, step.for_prompts)
        return True, sequence.request.priority, served, -1.0, sequence.order

    def _continue(self, sequence: Sequence, step: _Step) -> None:
        """Give a running sequence its chunk, preempting others for pages. It may have to sit the step out."""
        num_tokens = min(sequence.num_uncomputed, step.budget)
        while not (room := self._grow(sequence, sequence.num_computed + num_tokens)):
            step.calm = False
            if room is Room.SOON:
                return
            victim = self._victims.for_growth(self.running)
            self._make_way(victim, step)
            if victim is sequence:
                return
        self._give(sequence, num_tokens, step, samples=num_tokens == sequence.num_uncomputed)

    def _give(self, sequence: Sequence, num_tokens: int, step: _Step, *, samples: bool) -> None:
        chunk = Chunk(sequence, num_tokens, samples)
        step.chunks[sequence.id] = chunk
        step.budget -= num_tokens
        self.fairness.charge(sequence, sequence.charge(chunk.stop), int(samples))

    # Who starts

    def _offer(self) -> Offer | None:
        """Who could start, in order; None where nobody could. Where all seats are taken: who has a claim on one."""
        if not self.waiting:
            return None
        if len(self.running) < self._max_num_seqs:
            return self.waiting.offer(self.ready)
        if self.waiting.priority < max(sequence.request.priority for sequence in self.running):
            return self.waiting.offer(self.ready, claims=True)
        tenants = self.waiting.tenants
        if len(self.fairness.active) > 1 and (tenants := self._victims.claimants(tenants, self.running)):
            return self.waiting.offer(self.ready, tenants, claims=True)
        return None

    def _admit(self, sequence: Sequence, offer: Offer, step: _Step) -> bool:
        """Start the first one of an offer, if it may start now. False where nobody after it may start in this step: a
        short one does not overtake one that waits for pages. One that waits for its adapter asks for none."""
        if not step.may_start(sequence):
            offer.skip()
            return True
        if self._prefixes.follow(sequence):
            self.waiting.set_aside(sequence)
            step.followers += 1
            return step.followers < MOST_FOLLOWERS
        if not self._has_place(sequence, step):
            return False
        if not step.may_start(sequence):  # its adapter left with whoever gave way
            offer.skip()
            return True
        step.take(sequence)
        self._start(sequence)
        offer.started()
        wanted = sequence.num_uncomputed
        self._give(sequence, min(wanted, step.budget), step, samples=wanted <= step.budget)
        return True

    def _has_place(self, sequence: Sequence, step: _Step) -> bool:
        """A seat and pages, be it that somebody has to give way; no more than one in a step has to."""
        if self._is_free(sequence):
            return True
        if step.claimed:
            return False
        victim = self._victims.for_start(sequence, self._num_pages(sequence), self.running)
        if victim is None:
            return False
        step.claimed = True
        self._make_way(victim, step)
        return self._is_free(sequence)

    def _is_free(self, sequence: Sequence) -> bool:
        """Whether there is a seat, and its tokens and the next one fit the pages, with those of the prefix cache."""
        if len(self.running) >= self._max_num_seqs:
            return False
        count = self._num_pages(sequence)
        if self.pages.can_hold(count, ()):
            return True
        cached = self._prefixes.cached(sequence)
        return self.pages.can_hold(count, cached) or bool(self.more_pages(self.pages.lacking(count, cached)))

    def _num_pages(self, sequence: Sequence) -> int:
        return self.pages.pages_for(len(sequence.tokens) + min(sequence.request.sampling.max_tokens, 1))

    def _start(self, sequence: Sequence) -> None:
        """Take the pages of the whole prompt at once, so that admitted prompts do not take them from each other."""
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.order)
        sequence.status = Status.RUNNING
        sequence.pages = self._prefixes.cached(sequence)
        self.pages.share(sequence.pages)
        sequence.reuse(len(sequence.pages) * self.pages.page_size)
        self._prefixes.lead(sequence)
        if self.pages.cache is not None and sequence.num_reusable and not sequence.preemptions:
            self.queried_tokens += len(sequence.request.prompt)
            sequence.num_given = sequence.num_cached_prompt
            self.cached_tokens += sequence.num_given
        self._grow(sequence, len(sequence.tokens))

    def computed(self, chunks: Iterable[Chunk]) -> None:
        """These chunks' K and V are in their pages before the device does anything that it is told from now on, and
        their tokens are known: the pages that are full can be found by others."""
        size, caching = self.pages.page_size, self.pages.cache is not None
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.status is not Status.RUNNING:  # it has ended since
                continue
            sequence.num_computed = chunk.stop - len(chunk.drafts)
            if chunk.drafts:  # computed as a prompt's tokens are, right or wrong
                self.fairness.charge(sequence, len(chunk.drafts), 0)
            if caching and sequence.num_computed >= (sequence.num_filed + 1) * size:
                self._bring_back(self._prefixes.computed(sequence))

    def observe(self, chunks: Iterable[Chunk], seconds: float) -> None:
        """What a step over these chunks took, from its launch to its tokens."""
        decodes = prompts = 0
        for chunk in chunks:
            if chunk.num_tokens == 1 or chunk.drafts:
                decodes += 1
            else:
                prompts += chunk.num_tokens
        self.pace.observe(decodes, prompts, seconds)

    def _bring_back(self, followers: Iterable[Sequence]) -> None:
        for follower in followers:
            self.waiting.bring_back(follower)

    # Pages, and who gives them back

    def _grow(self, sequence: Sequence, num_tokens: int) -> Room:
        if num_tokens <= len(sequence.pages) * self.pages.page_size:
            return Room.NOW
        missing = self.pages.pages_for(num_tokens) - len(sequence.pages)
        pages = self.pages.allocate(missing)
        if pages is None:
            room = self.more_pages(missing - self.pages.num_free)
            pages = self.pages.allocate(missing) if room else None
            if pages is None:
                return room
        sequence.pages.extend(pages)
        return Room.NOW

    def _make_way(self, victim: Sequence, step: _Step) -> None:
        step.chunks.pop(victim.id, None)
        self._preempt(victim, step.release)

    def _preempt(self, sequence: Sequence, release: Release) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        release(sequence)
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.waiting.add(sequence)
        self.preemptions += 1

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._free(sequence)
        self.fairness.leave(sequence)
        sequence.status = Status.FINISHED

    def _free(self, sequence: Sequence) -> None:
        self._bring_back(self._prefixes.stop(sequence))
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
        """Prove the book of pages: every held page is held by running sequences, and by as many as are counted; and the
        books of who waits: lines, accounts and leaders."""
        self.pages.check([sequence.pages for sequence in self.running])
        for sequence in self.running:
            sequence.check(self.pages.page_size)
        self.waiting.check()
        self.fairness.check([*self.running, *self.waiting])
        self._prefixes.check(self.running, [one for one in self.waiting.aside if not one.awaits_grammar])
