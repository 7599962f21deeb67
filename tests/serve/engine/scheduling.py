"""A scheduler without an engine: sequences, and steps that compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.fairness import Fairness
from onebase.serve.engine.layout import Layout, Span
from onebase.serve.engine.messages import AdapterUse, Request, SamplingParams
from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.prefix_cache import PrefixCache
from onebase.serve.engine.scheduler import Scheduler
from onebase.serve.engine.sequence import Sequence

PAGE = 4


def sequence_of(
    order: int, length: int | Iterable[int] = 4, adapter: str = "", max_tokens: int = 8, **request: Any
) -> Sequence:
    """One that is laid out. length: of a prompt that is shared with nobody, or the prompt."""
    prompt = tuple(range(1000 * order, 1000 * order + length)) if isinstance(length, int) else tuple(length)
    uses = (AdapterUse(adapter, ""),) if adapter else ()
    made = Sequence.of(Request(f"s{order}", prompt, SamplingParams(max_tokens), uses, **request), order)
    if adapter:
        made.lay_out(Layout(spans=((Span(0),),)))
    return made


class Steps:
    """Drives a scheduler; a sequence ends with its last token."""

    def __init__(
        self,
        num_pages: int = 1000,
        tokens: int = 64,
        seqs: int = 4,
        *,
        weights: dict[str, float] | None = None,
        caching: bool = True,
    ) -> None:
        cache = PrefixCache() if caching else None
        self.fairness = Fairness(weights)
        self.scheduler = Scheduler(PageAllocator(num_pages, PAGE, cache), tokens, seqs, self.fairness)
        self.absent: set[str] = set()  # adapters
        self.prompt_tokens = 0  # computed
        self.served: dict[str, float] = {}  # tenant -> virtual tokens, unweighted
        self.finished: list[Sequence] = []

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)

    def step(self) -> list[Chunk]:
        chunks = self.scheduler.schedule(lambda s: self.absent.isdisjoint(s.digests), lambda _: None, lambda _: None)
        told = [(chunk.sequence, chunk.num_tokens, chunk.start, chunk.stop) for chunk in chunks]
        for chunk in chunks:
            self.scheduler.computed([chunk])
        for chunk, (sequence, _, start, stop) in zip(chunks, told, strict=True):
            tenant = sequence.request.tenant
            self.prompt_tokens += sequence.prompt_tokens(start, stop)
            cost = sequence.prompt_tokens(start, stop) + 2 * chunk.samples
            self.served[tenant] = self.served.get(tenant, 0.0) + cost
            if chunk.samples:
                sequence.tokens.append(7)
                if sequence.num_generated >= sequence.request.sampling.max_tokens:
                    self.scheduler.finish(sequence)
                    self.finished.append(sequence)
        self.scheduler.check()
        return chunks

    def run(self, *, most: int = 5000, until: Callable[[], bool] | None = None) -> int:
        """Until nobody is left, or ``until``; the steps that took."""
        for count in range(most):
            if until is not None and until():
                return count
            if not self.scheduler.waiting and not self.scheduler.running:
                return count
            self.step()
        raise AssertionError("it did not end")
