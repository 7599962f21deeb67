"""One sequence being generated: its tokens, its pages, where it stands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from onebase.adapters.tiers.entry import Entry
from onebase.kernels.plan import Run, Uses
from onebase.serve.engine.asked import draws_the_largest
from onebase.serve.engine.grammar import Matcher
from onebase.serve.engine.layout import Layout, span_at
from onebase.serve.engine.messages import AdapterUse, FinishReason, Request
from onebase.serve.engine.ngram import Lookup
from onebase.serve.engine.pooling import Pool
from onebase.serve.engine.prefix_cache import Activation, Block, root_of
from onebase.serve.engine.token_counts import TokenCounts


class Status(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Invariant: 0 <= num_computed <= num_tokens, and the pages hold at least num_computed tokens.

    tokens: the virtual ones (negative ids, -1 is the first), the prompt's, the generated ones; one slot each.
    num_computed counts tokens whose K/V is in pages (or comes from the adapter before the next chunk). The last token
    of a decoding sequence has been sampled but not yet computed. num_cached: slots that the prefix cache gave.
    num_unseen: tokens after ``tokens`` that the device has drawn, or draws, and the host has not seen: 0 or 1.
    lookup: of its tokens, where they are drafted.
    num_filed: pages that the prefix cache was told of. max_len: tokens at which it ends in any case.
    num_given: tokens of the prompt that the prefix cache gave when it first started; later it finds its own again.
    num_charged: slots up to the prompt's end that its tenant's account has seen. num_paid: those of them that it was
    charged for; the cache gave the others. preemptions: how often it was preempted.
    num_scored: tokens of the prompt whose successor's log-probability was told. unclassified: slots that a
    classification head has still to read. pool: of a request that embeds. order: arrival; never changes, so preempted
    sequences keep their place.
    layout: None until its adapters are known. eos: the model's end tokens. counts: of its tokens, where it asks for
    penalties; adjust.py makes and keeps them. matcher: its place in its grammar; it may not start without.
    """

    request: Request
    order: int
    tokens: list[int]
    num_computed: int = 0
    num_cached: int = 0
    num_unseen: int = 0
    num_filed: int = 0
    max_len: int = sys.maxsize
    num_given: int = 0
    num_charged: int = 0
    num_paid: int = 0
    preemptions: int = 0
    num_scored: int = 0
    unclassified: range = range(0)
    pages: list[int] = field(default_factory=list)
    adapters: tuple[Entry, ...] = ()  # referenced while it runs, in the order of the request
    status: Status = Status.WAITING
    layout: Layout | None = None
    eos: frozenset[int] = frozenset()
    counts: TokenCounts | None = None
    lookup: Lookup | None = None
    matcher: Matcher | None = None
    pool: Pool | None = None
    id: str = field(init=False)  # the request's
    ends: frozenset[int] = field(init=False)  # tokens that end it
    start_len: int = field(init=False)  # tokens before the first generated one, once its adapters are known
    end_len: int = field(init=False)  # and those with the last one, if none ends it before
    is_greedy: bool = field(init=False)  # whether the largest logit is all that it asks for
    is_read: bool = field(init=False)  # whether anybody wants to know more of its prompt than the next token
    digests: tuple[str, ...] = field(init=False)  # of the request\'s adapters
    _blocks: list[Block] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = self.request.id
        self.digests = tuple(use.digest for use in self.request.adapters)
        sampling = self.request.sampling
        self.is_greedy = draws_the_largest(sampling)
        self._measure()
        self.is_read = sampling.prompt_logprobs is not None or self.request.classifies or bool(self.request.embeds)
        self.ends = (
            frozenset(sampling.stop_token_ids) if sampling.ignore_eos else self.eos.union(sampling.stop_token_ids)
        )

    @classmethod
    def of(
        cls, request: Request, order: int, eos: frozenset[int] = frozenset(), max_len: int = sys.maxsize
    ) -> Sequence:
        """Without adapters it is laid out at once."""
        sequence = cls(request, order, list(request.prompt), eos=eos, max_len=max_len)
        if not request.adapters:
            sequence.lay_out(Layout())
        return sequence

    def lay_out(self, layout: Layout) -> None:
        """Its adapters are known: put their virtual tokens before the prompt."""
        self.layout = layout
        self.tokens[:0] = range(-1, -1 - layout.num_virtual, -1)
        self._measure()
        self.pool = Pool.of(self.request, layout)
        self.restart()

    def _measure(self) -> None:
        self.start_len = self.num_virtual + len(self.request.prompt)
        self.end_len = min(self.start_len + self.request.sampling.max_tokens, self.max_len)

    def restart(self) -> None:
        """Forget what was computed. The K and V that an adapter stores count as computed: they are copied."""
        self.num_cached = self.num_filed = 0
        self.counts = None
        self.num_computed = self.placed.num_stored

    def reuse(self, num_cached: int) -> None:
        """The first slots are in its pages already, by the prefix cache."""
        self.num_cached = num_cached
        self.num_filed = len(self.pages)
        self.num_computed = max(num_cached, self.placed.num_stored)

    @property
    def placed(self) -> Layout:
        """The layout, of a sequence whose adapters are known."""
        if self.layout is None:
            raise RuntimeError(f"{self.id}: its adapters are not known yet")
        return self.layout

    @property
    def num_virtual(self) -> int:
        return 0 if self.layout is None else self.layout.num_virtual

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + self.num_unseen

    @property
    def num_uncomputed(self) -> int:
        """What is to be computed next. Nothing where the token that the host has not seen is the last in any case."""
        known = len(self.tokens)
        if not self.num_unseen:
            return known - self.num_computed
        return 0 if self.end_len - known <= self.num_unseen else known + self.num_unseen - self.num_computed

    @property
    def num_left(self) -> int:
        """How many tokens may follow those that the host has seen."""
        return self.end_len - len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.start_len

    @property
    def num_reusable(self) -> int:
        """How many leading slots the prefix cache may give: nobody reads what the model says there. The last token is
        always computed: somebody wants its logits."""
        told = self.num_scored >= len(self.request.prompt) - 1
        if self.request.sampling.prompt_logprobs is not None and not told:
            return 0
        unread = self.unclassified or (range(0) if self.pool is None else self.pool.left)
        return unread.start if unread else len(self.tokens) - 1

    @property
    def uncopied(self) -> range:
        """Slots whose stored K and V must be copied to its pages before its next chunk."""
        last = self.placed.num_stored
        return range(self.num_cached, last) if self.num_cached < last == self.num_computed else range(0)

    @property
    def num_cached_prompt(self) -> int:
        """Tokens of its prompt that the prefix cache gave."""
        return self.prompt_tokens(0, self.num_cached)

    def prompt_tokens(self, start: int, stop: int) -> int:
        """How many of the slots [start, stop) hold tokens of the prompt."""
        end = self.start_len
        return 0 if start >= end else max(min(stop, end) - max(start, self.num_virtual), 0)

    def uses_at(self, slot: int) -> Uses:
        """(handle, scale) of the adapters that act on a slot, in the present step."""
        if not self.adapters:
            return ()
        if self.placed.everywhere:  # nearly always: a step asks this several times for each of its rows
            if len(self.adapters) == 1:
                return ((self.adapters[0].handle, self.request.adapters[0].scale),)
            return tuple((e.handle, use.scale) for e, use in zip(self.adapters, self.request.adapters, strict=True))
        return tuple((entry.tail if at_end else entry.handle, use.scale) for entry, use, at_end in self.acting_at(slot))

    def acting_at(self, slot: int) -> Iterator[tuple[Entry, AdapterUse, bool]]:
        """The adapters that act on a slot, and whether as at the end of their window."""
        for entry, use, spans in zip(self.adapters, self.request.adapters, self.placed.spans, strict=True):
            span = span_at(spans, slot)
            if span is not None:
                yield entry, use, span.at_end

    def runs(self, start: int, stop: int) -> list[Run]:
        """The slots [start, stop) as runs of equal uses: several where an adapter begins or ends inside."""
        inner = (
            []
            if stop - start == 1 or self.placed.everywhere
            else [at for at in self.placed.borders if start < at < stop]
        )
        if not inner:
            return [(stop - start, self.uses_at(start))]
        cuts = [start, *inner, stop]
        return [(stop - start, self.uses_at(start)) for start, stop in pairwise(cuts)]

    def charge(self, stop: int) -> int:
        """It is computed up to this slot: how many slots up to the prompt's end are new to its tenant's account. What
        is computed again after a preemption is not."""
        end = min(stop, self.start_len)
        if self.num_charged >= end:
            return 0
        new = max(end - max(self.num_charged, self.num_computed), 0)
        self.num_charged = max(self.num_charged, end)
        self.num_paid += new
        return new

    def block(self, index: int, page_size: int) -> Block:
        """What its page ``index`` holds once it is full; there must be as many tokens."""
        while len(self._blocks) <= index:
            start = len(self._blocks) * page_size
            parent = self._blocks[-1].key if self._blocks else root_of(self.request.tenant, self.request.cache_salt)
            tokens = self.tokens[start : start + page_size]
            self._blocks.append(Block.of(parent, tokens, self._activation(start, start + page_size)))
        return self._blocks[index]

    def _activation(self, start: int, stop: int) -> Activation:
        entries = zip(self.request.adapters, self.placed.spans, strict=True)
        return tuple(
            sorted(
                (use.digest, use.scale, max(span.start, start) - start, min(span.stop, stop) - start, span.at_end)
                for use, spans in entries
                for span in spans
                if span.start < stop and span.stop > start
            )
        )

    @property
    def awaits_grammar(self) -> bool:
        """Whether its grammar is still being compiled."""
        return self.matcher is None and self.request.sampling.grammar is not None

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ends after its last token, or None where it goes on."""
        if self.tokens[-1] in self.ends or (self.matcher is not None and self.matcher.is_done):
            return "stop"
        return "length" if len(self.tokens) >= self.end_len else None

    def check(self, page_size: int) -> None:
        if not 0 <= self.num_computed <= self.num_tokens:
            raise RuntimeError(f"{self.id}: computed {self.num_computed} of {self.num_tokens} tokens")
        if len(self.pages) * page_size < self.num_computed:
            raise RuntimeError(f"{self.id}: {len(self.pages)} pages for {self.num_computed} tokens")
