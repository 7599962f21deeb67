"""The sequences that wait: which adapters are loaded for them, how they are laid out, which of them can never run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onebase.adapters.cache import AdapterCache
from onebase.adapters.errors import AdapterTooLarge, OneBaseError, RequestRejected
from onebase.adapters.traits import Traits
from onebase.serve.engine.classes import check_heads, read_slots
from onebase.serve.engine.combine import check_combination, check_windows
from onebase.serve.engine.layout import Layout
from onebase.serve.engine.messages import AdapterUse
from onebase.serve.engine.scheduler import Scheduler
from onebase.serve.engine.sequence import Sequence

# Loads that are started before their sizes are known; each takes host memory until it is placed or dropped.
_MOST_COMPILING = 4

Refused = list[tuple[Sequence, OneBaseError]]


@dataclass(slots=True)
class _Room:
    """What is left of a tier. planned: parts that are in it, whoever needs them."""

    left: int
    planned: set[str]

    def take(self, parts: Mapping[str, int]) -> None:
        self.left -= sum(size for part, size in parts.items() if part not in self.planned)
        self.planned.update(parts)

    @property
    def is_left(self) -> bool:
        return self.left >= 0


class WaitingRoom:
    """Looks after the scheduler's waiting sequences; takes none of them out.

    wanted: adapters that the first of them need, on the device or for now in host memory; kept: those of these that fit
    the device together.
    """

    def __init__(
        self, scheduler: Scheduler, adapters: AdapterCache, max_model_len: int, pad: int | None, lookahead: int
    ) -> None:
        """pad: the base's padding token, which classification heads do not read. lookahead: how many are the first."""
        self.wanted: set[str] = set()
        self.kept: set[str] = set()
        self._pinned: dict[str, int] = {}  # parts of pinned adapters
        self._scheduler = scheduler
        self._adapters = adapters
        self._max_model_len = max_model_len
        self._pad = pad
        self._lookahead = lookahead

    def prefetch(self) -> None:
        """Start the loads that waiting requests need, oldest first: onto the device as far as its budget goes, and then
        to host memory, for the next turn.

        Those that fit the device together are not evicted for each other or for anybody behind them, so that requests
        over more adapters than fit are served in turns, without thrash.
        """
        self.kept, self.wanted = set(), set()
        self._pinned = self._adapters.pins.within(self._adapters.arena.limit_bytes)[1]
        room = _Room(self._adapters.device.reach_bytes - sum(self._pinned.values()), set(self._pinned))
        host = _Room(self._adapters.host.capacity, set())
        for sequence in self._scheduler.waiting[: self._lookahead]:
            new = {use.digest: use for use in sequence.request.adapters if use.digest not in self.kept}
            if new and self._adapters.num_compiling > _MOST_COMPILING:
                break
            if room.is_left:
                self._bring(new, room)
            elif not self._bring_closer(new, host):
                break

    def _bring(self, uses: Mapping[str, AdapterUse], room: _Room) -> None:
        """Have the adapters loaded. They are kept if they fit; the oldest request's are: room is made for them."""
        for digest in uses:
            room.take(self._adapters.parts(digest))
        fit = room.is_left or not self.kept
        for digest, use in uses.items():
            self._adapters.await_ready(digest, use.path, place=fit)
        self.wanted.update(uses)
        if fit:
            self.kept.update(uses)

    def _bring_closer(self, uses: Mapping[str, AdapterUse], host: _Room) -> bool:
        """Have the adapters in host memory; False where it has no room for more."""
        for digest in uses:
            host.take(self._adapters.parts(digest))
        if not host.is_left:
            return False
        for digest, use in uses.items():
            if digest not in self._adapters.host:
                self._adapters.await_ready(digest, use.path, place=False)
        self.wanted.update(uses)
        return True

    @property
    def needed_bytes(self) -> int:
        """What the pinned adapters and those of the oldest request that has any take together, as far as is known."""
        oldest = next((s for s in self._scheduler.waiting if s.request.adapters), None)
        return 0 if oldest is None else self._together(oldest)

    def _together(self, sequence: Sequence) -> int:
        """Bytes that the adapters of a sequence take beside the pinned ones, with these, as far as it is known."""
        taken = dict(self._pinned)
        for digest in sequence.digests:
            taken |= self._adapters.parts(digest)
        return sum(taken.values())

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
        """Those whose adapters do not fit the device together, or beside the pinned ones, though each does alone."""
        capacity = self._adapters.arena.limit_bytes
        refused: Refused = []
        for sequence in [s for s in self._scheduler.waiting if len(s.request.adapters) > (0 if self._pinned else 1)]:
            total = self._together(sequence)
            if total > capacity:
                beside = f" with {sum(self._pinned.values())} of pinned adapters" if self._pinned else ""
                message = f"adapters: together they take {total} bytes{beside}, the device budget is {capacity}"
                refused.append((sequence, AdapterTooLarge(message, param="adapters")))
        return refused

    def over(self, digest: str) -> list[Sequence]:
        """Those that wait for this adapter."""
        return [sequence for sequence in self._scheduler.waiting if digest in sequence.digests]
