"""The sequences that wait: which adapters are loaded for them, how they are laid out, which of them can never run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onebase.adapters.errors import AdapterTooLarge, OneBaseError, RequestRejected
from onebase.adapters.tiers.cache import AdapterCache
from onebase.adapters.traits import Traits
from onebase.serve.engine.classes import check_heads, read_slots
from onebase.serve.engine.combine import check_combination, check_windows
from onebase.serve.engine.layout import Layout
from onebase.serve.engine.scheduler import Scheduler
from onebase.serve.engine.sequence import Sequence, Status
from onebase.serve.engine.turns import Turns

Refused = list[tuple[Sequence, OneBaseError]]


class WaitingRoom:
    """Looks after the scheduler's waiting sequences; takes none of them out.

    Thousands may wait, and most of them for long: but for the first ones, a sequence costs a step nothing in which
    nothing has changed for it.
    """

    def __init__(
        self, scheduler: Scheduler, adapters: AdapterCache, max_model_len: int, pad: int | None, lookahead: int
    ) -> None:
        """pad: the base's padding token, which classification heads do not read. lookahead: how many adapters, at
        most, are planned for at a time."""
        self._turns = Turns(adapters)
        self._lookahead = lookahead
        self._scheduler = scheduler
        self._adapters = adapters
        self._max_model_len = max_model_len
        self._pad = pad
        self._over: dict[str, dict[Sequence, None]] = {}  # adapter -> the sequences over it, also those that run
        self._new: dict[Sequence, None] = {}  # to be looked at
        self._pinned: Mapping[str, int] = {}  # the pins' parts when all were looked at
        self._first: Sequence | None = None  # of those over adapters, by turns

    def add(self, sequence: Sequence) -> None:
        """One that will wait: the scheduler's as well."""
        for digest in sequence.digests:
            self._over.setdefault(digest, {})[sequence] = None
            self._new[sequence] = None

    def leave(self, sequence: Sequence) -> None:
        """It ended, one way or the other."""
        self._new.pop(sequence, None)
        for digest in sequence.digests:
            over = self._over.get(digest, {})
            over.pop(sequence, None)
            if not over:
                self._over.pop(digest, None)

    def prefetch(self) -> None:
        """Decide whose turn it is, and start the loads that waiting requests need."""
        first = self._scheduler.waiting.longest_waiting(self._lookahead)
        self._first = first[0] if first else None
        self._turns.plan(first)

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
        """What the pinned adapters and those of the first request that has any take together, as far as is known."""
        return 0 if self._first is None else self._together(self._first)

    def _together(self, sequence: Sequence) -> int:
        """Bytes that the adapters of a sequence take beside the pinned ones, with these, as far as it is known."""
        pinned, parts = self._turns.pinned, dict[str, int]()
        for digest in sequence.digests:
            parts |= self._adapters.parts(digest)
        return self._turns.pinned_bytes + sum(size for part, size in parts.items() if part not in pinned)

    def may_start(self, sequence: Sequence) -> bool:
        """Whether all its tokens are known, its adapters are resident, and new references on them hold nobody back."""
        if sequence.num_unseen or sequence.layout is None or not all(map(self._adapters.is_ready, sequence.digests)):
            return False
        return self._turns.may_start(sequence.digests)

    def lay_out(self, known: Iterable[str]) -> Refused:
        """Give sequences their virtual tokens, once their adapters are compiled. Those that can never run.

        known: adapters whose compilation has just ended. A sequence is looked at when it comes, when one of its
        adapters becomes known, and when the room beside the pins changes."""
        refused: Refused = []
        for sequence in self._unseen(known):
            try:
                self._check_size(sequence)
                self._lay_out(sequence)
            except OneBaseError as error:
                refused.append((sequence, error))
        return refused

    def _unseen(self, known: Iterable[str]) -> list[Sequence]:
        if self._turns.pinned != self._pinned:
            self._pinned, known = self._turns.pinned, self._over
        unseen = {**self._new, **{sequence: None for digest in known for sequence in self._over.get(digest, ())}}
        self._new = {
            sequence: None for sequence in unseen if sequence.status is Status.RUNNING
        }  # until they wait again
        return sorted((one for one in unseen if one.status is Status.WAITING), key=lambda sequence: sequence.order)

    def _lay_out(self, sequence: Sequence) -> None:
        if sequence.layout is None:
            traits = [self._adapters.traits(use.digest) for use in sequence.request.adapters]
            known = [one for one in traits if one is not None]
            if len(known) == len(traits):
                self._place(sequence, known)

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

    def _check_size(self, sequence: Sequence) -> None:
        """Raises AdapterTooLarge where its adapters do not fit the device together, or beside the pinned ones, though
        each does alone."""
        capacity, total, pinned = self._adapters.arena.limit_bytes, self._together(sequence), self._turns.pinned_bytes
        if total > capacity:
            beside = f" with {pinned} of pinned adapters" if pinned else ""
            message = f"adapters: together they take {total} bytes{beside}, the device budget is {capacity}"
            raise AdapterTooLarge(message, param="adapters")

    def over(self, digest: str) -> list[Sequence]:
        """Those that wait for this adapter."""
        return [sequence for sequence in self._over.get(digest, ()) if sequence.status is Status.WAITING]
