"""The sequences that wait: which adapters are loaded for them, how they are laid out, which of them can never run."""

from __future__ import annotations

from onebase.adapters.cache import AdapterCache
from onebase.adapters.errors import AdapterTooLarge, OneBaseError, RequestRejected
from onebase.adapters.traits import Traits
from onebase.serve.engine.classes import check_heads, read_slots
from onebase.serve.engine.combine import check_combination, check_windows
from onebase.serve.engine.layout import Layout
from onebase.serve.engine.scheduler import Scheduler
from onebase.serve.engine.sequence import Sequence

# Loads that are started before their sizes are known; each takes host memory until it is placed or dropped.
_MOST_COMPILING = 4

Refused = list[tuple[Sequence, OneBaseError]]


class WaitingRoom:
    """Looks after the scheduler's waiting sequences; takes none of them out.

    wanted: adapters that the first of them need; kept: those of these that fit the device together.
    """

    def __init__(
        self, scheduler: Scheduler, adapters: AdapterCache, max_model_len: int, pad: int | None, lookahead: int
    ) -> None:
        """pad: the base's padding token, which classification heads do not read. lookahead: how many are the first."""
        self.wanted: set[str] = set()
        self.kept: set[str] = set()
        self._scheduler = scheduler
        self._adapters = adapters
        self._max_model_len = max_model_len
        self._pad = pad
        self._lookahead = lookahead

    def prefetch(self) -> None:
        """Start the loads that waiting requests need, oldest first, as far as the device budget goes.

        Those that fit it together are not evicted for each other or for anybody behind them, so that requests over more
        adapters than fit are served in turns, without thrash.
        """
        self.kept, self.wanted = set(), set()
        room, planned = self._adapters.reach_bytes, set[str]()
        for sequence in self._scheduler.waiting[: self._lookahead]:
            new = {use.digest: use for use in sequence.request.adapters if use.digest not in self.kept}
            if room < 0 or (new and self._adapters.num_compiling > _MOST_COMPILING):
                break
            for use in new.values():
                self._adapters.fetch(use.digest, use.path)
                parts = self._adapters.parts(use.digest)
                room -= sum(size for part, size in parts.items() if part not in planned)
                planned.update(parts)
            self.wanted.update(new)
            if room >= 0 or not self.kept:  # the oldest's are: room is made for them
                self.kept.update(new)

    @property
    def needed_bytes(self) -> int:
        """What the adapters of the oldest request that has any take together, as far as it is known."""
        oldest = next((s for s in self._scheduler.waiting if s.request.adapters), None)
        parts = [] if oldest is None else [self._adapters.parts(digest) for digest in oldest.digests]
        return sum({part: size for one in parts for part, size in one.items()}.values())

    def may_start(self, sequence: Sequence) -> bool:
        """Whether all its adapters are resident, and new references on them hold nobody back."""
        if sequence.layout is None or not all(map(self._adapters.is_ready, sequence.digests)):
            return False
        # New references would keep an older request's adapter out of the arena for ever.
        return not self._adapters.blocked or self.kept.issuperset(sequence.digests)

    def lay_out(self) -> Refused:
        """Give sequences their virtual tokens, once their adapters are compiled. Those that cannot be laid out."""
        refused: Refused = []
        for sequence in [s for s in self._scheduler.waiting if s.layout is None]:
            traits = [self._adapters.traits(use.digest) for use in sequence.request.adapters]
            known = [one for one in traits if one is not None]
            if len(known) < len(traits):
                continue
            try:
                self._place(sequence, known)
            except RequestRejected as error:
                refused.append((sequence, error))
        return refused

    def _place(self, sequence: Sequence, traits: list[Traits]) -> None:
        """Lay a sequence out. Raises RequestRejected where its adapters do not go together, or no token has room."""
        request = sequence.request
        check_combination(request.adapters, traits)
        check_windows(request.prompt, request.adapters, traits)
        if request.classifies:
            check_heads(request.adapters, traits)
        scales = [use.scale for use in request.adapters]
        layout = Layout.of(request.prompt, list(zip(traits, scales, strict=True)))
        sequence.lay_out(layout)
        sequence.unclassified = read_slots(request, traits, layout, self._pad)
        if len(sequence.tokens) + min(request.sampling.max_tokens, 1) > self._max_model_len:
            message = (
                f"the prompt has {len(request.prompt)} tokens and its adapter puts {layout.num_virtual} virtual tokens "
                f"before it; the model's context is {self._max_model_len}"
            )
            raise RequestRejected(message, param="prompt")

    def oversized(self) -> Refused:
        """Those whose adapters do not fit the device together, though each one does."""
        capacity = self._adapters.arena.limit_bytes
        refused: Refused = []
        for sequence in [s for s in self._scheduler.waiting if len(s.request.adapters) > 1]:
            parts = [self._adapters.parts(digest) for digest in sequence.digests]
            total = sum({part: size for one in parts for part, size in one.items()}.values())
            if total > capacity:
                message = f"adapters: together they take {total} bytes, the device budget is {capacity}"
                refused.append((sequence, AdapterTooLarge(message, param="adapters")))
        return refused

    def over(self, digest: str) -> list[Sequence]:
        """Those that wait for this adapter."""
        return [sequence for sequence in self._scheduler.waiting if digest in sequence.digests]
