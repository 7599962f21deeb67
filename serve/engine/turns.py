"""Turns: which adapters are to be on the device next, where those that requests wait for do not all fit.

Waiting requests are gone through, one for each set of adapters, of each tenant in turn its oldest (Backlog has that
order). "Older" below means: before in it. Each one's adapters are planned onto the device, beside those that are
running; where they do not fit, running ones that no older request needs are drained: they take no new references, so
that they can be evicted once their last request has ended. What has room now is not evicted for anybody behind it, and
room that comes free goes to the oldest that waits for it. So every load serves somebody before it goes, and a stream of
younger requests over what is there starves nobody.

The plan is made anew before each step, and prefers to drain those that it drained before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from onebase.adapters.tiers.cache import AdapterCache
from onebase.serve.engine.messages import AdapterUse
from onebase.serve.engine.sequence import Sequence

# Loads that are started before their sizes are known; each takes host memory until it is placed or dropped.
_MOST_COMPILING = 4

Parts = Mapping[str, int]  # block -> bytes, as AdapterCache.parts has it


@dataclass(slots=True)
class _Room:
    """What is left of a tier's bytes. Blocks that several adapters share count once."""

    left: int
    users: Counter[str] = field(default_factory=Counter)

    def take(self, parts: Parts) -> None:
        self.left -= sum(size for part, size in parts.items() if not self.users[part])
        self.users.update(parts.keys())

    def give_back(self, parts: Parts) -> None:
        self.users.subtract(parts.keys())
        self.left += sum(size for part, size in parts.items() if not self.users[part])


class Turns:
    """wanted: adapters that the first waiting requests need, on the device or for now in host memory. planned: those of
    them that are to be on the device, oldest request first, and whether there is room now, or only once others are
    drained. draining: running ones that have to go. pins: those that have room on the device; they need no turn once
    they are there. pinned: their blocks, with bytes, pinned_bytes together. running: digests that running requests held
    when the plan was made, but for pinned ones."""

    def __init__(self, adapters: AdapterCache) -> None:
        self.wanted: set[str] = set()
        self.planned: dict[str, bool] = {}
        self.draining: set[str] = set()
        self.pins: Collection[str] = ()
        self.pinned: Parts = {}
        self.pinned_bytes = 0
        self.running: set[str] = set()
        self._adapters = adapters
        self._parts: dict[str, Parts] = {}  # of adapters that requests wait for, also of those that had to be dropped
        self._drained: set[str] = set()  # by the last plan
        self._may_go: list[str] = []  # running ones that can be drained, the coldest last

    def plan(self, first: list[Sequence]) -> None:
        """Decide, and have loaded what is decided: onto the device, and for the next turn into host memory.

        first: waiting sequences over adapters, in the order of turns."""
        self.planned, self.wanted = {}, set()
        self._drained, self.draining = self.draining, set()
        pins, self.pinned = self._adapters.pins.within(self._adapters.arena.limit_bytes)
        self.pins, self.pinned_bytes = pins, sum(self.pinned.values())
        if not first:
            self._parts.clear()
            return
        self._remember(digest for sequence in first for digest in sequence.digests)
        self.running = self._adapters.running() - pins.keys()
        coldest_first = self._adapters.policy.coldest_first
        self._may_go = [*coldest_first(self.running & self._drained), *coldest_first(self.running - self._drained)][
            ::-1
        ]
        self._go_through(first)

    def _go_through(self, waiting: list[Sequence]) -> None:
        room, later = self._device_room(), self._device_room()
        host, full = self._host_room(), False
        for sequence in waiting:
            uses = {use.digest: use for use in sequence.request.adapters if self._needs_turn(use.digest)}
            if not uses or not self.draining.isdisjoint(uses):
                continue  # for the next turn: somebody older needs their room
            if self._adapters.num_compiling > _MOST_COMPILING and not all(map(self._adapters.is_known, uses)):
                self._leave_room(uses, room, later)
                continue
            full = full or not self._bring(uses, room, later, host)
            if full and not self._bring_closer(uses, host):
                return

    def _needs_turn(self, digest: str) -> bool:
        return digest not in self.planned and not (digest in self.pins and self._adapters.is_ready(digest))

    def _device_room(self) -> _Room:
        """Beside the pinned and the running ones."""
        room = _Room(self._adapters.device.reach_bytes)
        room.take(self.pinned)
        for digest in self.running:
            room.take(self._adapters.parts(digest))
        return room

    def _host_room(self) -> _Room:
        """In bytes as the device counts them: programs take more in host memory, by their records and by whole pages.
        Those on their way to the device take part of it, in the tier or outside, until they have been copied."""
        host, mean = self._adapters.host, self._adapters.transit.mean_bytes
        share = len(host) * mean / host.used if host.used else 1.0
        return _Room(int(host.capacity * min(share, 1.0)))

    def _bring(self, uses: Mapping[str, AdapterUse], room: _Room, later: _Room, host: _Room) -> bool:
        """Plan the adapters onto the device; False where they do not fit beside those of older requests. The oldest
        request's always do: the device's room is made for them. Where they have to wait for room, and host memory has
        none, they are not loaded before."""
        new = [digest for digest in uses if digest not in self.running]
        for digest in new:
            room.take(self._parts_of(digest))
            later.take(self._parts_of(digest))
        if not self._drain_for(uses, later) and self.planned:
            return False
        has_room = room.left >= 0 or not new
        for digest in uses:
            if not self._adapters.is_ready(digest):
                host.take(self._parts_of(digest))
        if has_room or host.left >= 0 or not self.planned:
            for digest, use in uses.items():
                self._adapters.await_ready(digest, use.path)
            self.wanted.update(uses)
        self.planned.update(dict.fromkeys(uses, has_room))
        return True

    def _leave_room(self, uses: Iterable[str], *rooms: _Room) -> None:
        """For adapters that will be loaded as soon as others have been."""
        for digest in uses:
            for room in rooms:
                room.take(self._parts_of(digest))

    def _drain_for(self, uses: Collection[str], room: _Room) -> bool:
        """Drain running adapters until there is room; none where all of them are not enough."""
        if room.left >= 0:
            return True
        drained: list[str] = []
        while room.left < 0 and self._may_go:
            coldest = self._may_go.pop()
            if coldest not in self.planned and coldest not in uses:
                drained.append(coldest)
                room.give_back(self._adapters.parts(coldest))
        if room.left < 0:
            for digest in drained:
                room.take(self._adapters.parts(digest))
            self._may_go = drained[::-1]
            return False
        self.draining.update(drained)
        return True

    def _bring_closer(self, uses: Mapping[str, AdapterUse], host: _Room) -> bool:
        """Have the adapters in host memory; False where it has no room for more."""
        for digest in uses:
            host.take(self._parts_of(digest))
        if host.left < 0:
            return False
        for digest, use in uses.items():
            if digest not in self._adapters.host:
                self._adapters.await_ready(digest, use.path)
        self.wanted.update(uses)
        return True

    def may_start(self, digests: Iterable[str]) -> bool:
        """Whether new references on these, all of them ready, keep nobody older from the device."""
        if not self.draining.isdisjoint(digests):
            return False
        return not self._adapters.blocked or all(
            one in self.pins or one in self.running or self.planned.get(one) for one in digests
        )

    def _remember(self, digests: Iterable[str]) -> None:
        """What adapters take, as soon as it is known and as long as somebody waits: one that was read, and found to
        have no room, is not read again to find that out. Until it is known it is what most of them take."""
        self._parts = {digest: self._adapters.parts(digest) or self._parts.get(digest, {}) for digest in digests}

    def _parts_of(self, digest: str) -> Parts:
        return self._parts[digest] or {digest: self._adapters.transit.mean_bytes}
