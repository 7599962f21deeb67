"""Speculation: a step also computes drafts of the tokens to come, and keeps those that are drawn again.

A draft is verified by the request's own model: base, adapters, sampling. Draws are keyed by seed and position, so the
token drawn after a draft that was right is the one that would have been drawn without it. The row of a wrong draft, and
all after it, are dropped; the next step writes over their K and V, and no page of theirs has been filed for others.

Requests whose logits depend on the tokens drawn before (penalties, grammars, ends that must wait) are not drafted.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

from onebase.serve.engine.asked import wants_penalties
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.ngram import Lookup
from onebase.serve.engine.scheduler import Scheduler
from onebase.serve.engine.sequence import Sequence
from onebase.serve.engine.stats import Counters


class Speculation:
    """Lengthens the decodes of a scheduled step by drafts, as far as tokens and pages are to spare."""

    def __init__(self, config: EngineConfig, scheduler: Scheduler, counters: Counters) -> None:
        self._most = config.speculative_tokens
        self._matches = config.ngram_min, config.ngram_max
        self._scheduler = scheduler
        self._pages = scheduler.pages
        self._counters = counters

    def lengthened(self, chunks: Rows[Chunk]) -> list[Chunk]:
        """The chunks, some of them with drafts."""
        left = self._scheduler.limit.now - sum(chunk.num_tokens for chunk in chunks)
        found = []
        for chunk in chunks:
            spare = self._pages.num_free - len(chunks)  # each of them will soon need one
            found.append(self._lengthen(chunk, left) if left > 0 and spare > 0 else chunk)
            left -= len(found[-1].drafts)
        self._counters.drafted_tokens += sum(len(chunk.drafts) for chunk in found)
        return found

    def _lengthen(self, chunk: Chunk, left: int) -> Chunk:
        sequence = chunk.sequence
        most = min(self._most, left, sequence.num_left - 1)
        if most <= 0 or chunk.num_tokens != 1 or not chunk.samples or not may_be_drafted(sequence):
            return chunk
        drafts = self._lookup(sequence).propose(most, *self._matches)
        if not drafts or not self._grow(sequence, chunk.stop + len(drafts)):
            return chunk
        return Chunk(sequence, chunk.num_tokens + len(drafts), samples=True, drafts=drafts)

    def _lookup(self, sequence: Sequence) -> Lookup:
        """Over all its tokens but virtual ones."""
        found = sequence.lookup = sequence.lookup or Lookup()
        found.catch_up(sequence.tokens, sequence.num_virtual)
        return found

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for so many tokens, out of the free ones: nobody gives way to a draft."""
        missing = self._pages.pages_for(num_tokens) - len(sequence.pages)
        pages = self._pages.allocate(missing) if missing > 0 else []
        sequence.pages.extend(pages or ())
        return pages is not None


def may_be_drafted(sequence: Sequence) -> bool:
    """Whether its next draws depend on nothing but the tokens before them."""
    sampling = sequence.request.sampling
    early = sequence.num_generated < sampling.min_tokens
    return not (sequence.num_unseen or sampling.grammar or early or wants_penalties(sampling))
