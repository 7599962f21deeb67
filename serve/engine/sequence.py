"""One sequence being generated: its tokens, its pages, where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from onebase.adapters.entry import Entry
from onebase.serve.engine.messages import FinishReason, Request


class Status(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Invariant: 0 <= num_computed <= len(tokens), and the pages hold at least num_computed tokens.

    num_computed counts tokens whose K/V is in pages. The last token of a decoding sequence has been sampled but not
    yet computed. order: arrival; never changes, so preempted sequences keep their place.
    """

    request: Request
    order: int
    tokens: list[int]
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    adapters: tuple[Entry, ...] = ()  # referenced while it runs, in the order of the request
    status: Status = Status.WAITING

    @classmethod
    def of(cls, request: Request, order: int) -> Sequence:
        return cls(request, order, list(request.prompt))

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def uses(self) -> tuple[tuple[int, float], ...]:
        """(handle, scale) of its adapters in the present step."""
        pairs = zip(self.adapters, self.request.adapters, strict=True) if self.adapters else ()
        return tuple((entry.handle, use.scale) for entry, use in pairs)

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(use.digest for use in self.request.adapters)

    def finish_reason(self, eos: frozenset[int], max_model_len: int) -> FinishReason | None:
        """Why the sequence ends after its last token, or None where it goes on."""
        sampling, last = self.request.sampling, self.tokens[-1]
        if last in sampling.stop_token_ids or (last in eos and not sampling.ignore_eos):
            return "stop"
        if self.num_generated >= sampling.max_tokens or len(self.tokens) >= max_model_len:
            return "length"
        return None

    def check(self, page_size: int) -> None:
        if not 0 <= self.num_computed <= len(self.tokens):
            raise RuntimeError(f"{self.id}: computed {self.num_computed} of {len(self.tokens)} tokens")
        if len(self.pages) * page_size < self.num_computed:
            raise RuntimeError(f"{self.id}: {len(self.pages)} pages for {self.num_computed} tokens")
