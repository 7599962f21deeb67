"""The sequences that wait: which adapters are loaded for them, how they are laid out, which of them can never run."""

from __future__ import annotations

from collections.abc import Mapping

from onebase.adapters.errors import AdapterTooLarge, OneBaseError, RequestRejected
from onebase.adapters.tiers.cache import AdapterCache
from onebase.adapters.traits import Traits
from onebase.serve.engine.classes import check_heads, read_slots
from onebase.serve.engine.combine import check_combination, check_windows
from onebase.serve.engine.layout import Layout
from onebase.serve.engine.scheduler import Scheduler
from onebase.serve.engine.sequence import Sequence
from onebase.serve.engine.turns import Turns

Refused = list[tuple[Sequence, OneBaseError]]


class WaitingRoom:
    """Looks after the scheduler's waiting sequences; takes none of them out."""

    def __init__(
        self, scheduler: Scheduler, adapters: AdapterCache, max_model_len: int, pad: int | None, lookahead: int
    ) -> None:
        """pad: the base's padding token, which classification heads do not read. lookahead: how many are the first."""
        self._turns = Turns(adapters, lookahead)
        self._scheduler = scheduler
        self._adapters = adapters
        self._max_model_len = max_model_len
        self._pad = pad

    def prefetch(self) -> None:
        """Decide whose turn it is, and start the loads that waiting requests need."""
        self._turns.plan(self._scheduler.waiting)

    @property
    def wanted(self) -> set[str]:
        """Adapters that the first of them need, on the device or for now in host memory."""
        return self._turns.wanted

    @property
    def kept(self) -> set[str]:
        """Those of them that are to be on the device."""
        return set(self._turns.planned)

    @property
    def planned(self) -> Mapping[str, bool]:
        """The same, oldest request first, and whether they have room there now."""
        return self._turns.planned

    @property
    def needed_bytes(self) -> int:
        """What the pinned adapters and those of the oldest request that has any take together, as far as is known."""
        oldest = next((s for s in self._scheduler.waiting if s.request.adapters), None)
        return 0 if oldest is None else self._together(oldest)

    def _together(self, sequence: Sequence) -> int:
        """Bytes that the adapters of a sequence take beside the pinned ones, with these, as far as it is known."""
        taken = dict(self._turns.pinned)
        for digest in sequence.digests:
            taken |= self._adapters.parts(digest)
        return sum(taken.values())

    def may_start(self, sequence: Sequence) -> bool:
        """Whether all its adapters are resident, and new references on them hold nobody back."""
        if sequence.layout is None or not all(map(self._adapters.is_ready, sequence.digests)):
            return False
        return self._turns.may_start(sequence.digests)

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
        """Those whose adapters do not fit the device together, or beside the pinned ones, though each does alone."""
        capacity = self._adapters.arena.limit_bytes
        refused: Refused = []
        alone = 0 if self._turns.pinned else 1  # so many have room, as their compilation has shown
        for sequence in [s for s in self._scheduler.waiting if len(s.request.adapters) > alone]:
            total = self._together(sequence)
            if total > capacity:
                beside = f" with {sum(self._turns.pinned.values())} of pinned adapters" if self._turns.pinned else ""
                message = f"adapters: together they take {total} bytes{beside}, the device budget is {capacity}"
                refused.append((sequence, AdapterTooLarge(message, param="adapters")))
        return refused

    def over(self, digest: str) -> list[Sequence]:
        """Those that wait for this adapter."""
        return [sequence for sequence in self._scheduler.waiting if digest in sequence.digests]
