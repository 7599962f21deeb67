"""The device tier: makes room in the arena, by whatever is cheapest, and says who holds it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from onebase.adapters.packing import PackedProgram
from onebase.adapters.tiers.arena import Arena, Neighbour
from onebase.adapters.tiers.entry import Entry, State
from onebase.adapters.tiers.installer import Installer
from onebase.adapters.tiers.placement import Placed, Placement
from onebase.adapters.tiers.policy import Lrfu
from onebase.adapters.tiers.shared_blocks import SharedBlocks


class DeviceTier:
    """Entries that hold a block. Used by the engine's thread.

    neighbour: who may give the arena more room, and take some of it. pinned: digests that are never evicted. evicted:
    told of each entry that had to go.
    """

    def __init__(
        self,
        arena: Arena,
        shared: SharedBlocks,
        installer: Installer,
        policy: Lrfu,
        evicted: Callable[[Entry], None],
    ) -> None:
        self.arena = arena
        self.placement = Placement(arena, shared, installer)
        self.neighbour: Neighbour | None = None
        self.pinned: Collection[str] = ()
        self.evictions = 0
        self._entries: dict[str, Entry] = {}
        self._installer = installer
        self._policy = policy
        self._evicted = evicted

    @property
    def reach_bytes(self) -> int:
        """What the arena can have now: what it has, and what its neighbour could give."""
        return self.arena.capacity_bytes + (0 if self.neighbour is None else self.neighbour.spare_bytes)

    @property
    def entries(self) -> Collection[Entry]:
        """All that hold a block, whether or not they are ready."""
        return self._entries.values()

    def place(self, entry: Entry, protected: Collection[str], *, awaited: bool) -> Placed | None:
        """Room for a packed entry, or None. Nobody is evicted where that would not be enough.

        protected: digests that are not evicted. awaited: a request needs it, so the neighbour is asked as well.
        """
        packed = entry.packed
        if packed is None:
            raise RuntimeError(f"adapter {entry.digest} is not in host memory")
        found = self.placement.allocate(packed)
        if found is None and awaited and self._ask_neighbour(packed, cached=False):
            found = self.placement.allocate(packed)
        while found is None and self._eviction_helps(packed, protected) and self._evict_one(protected):
            found = self.placement.allocate(packed)
        if found is None and awaited and self._ask_neighbour(packed, cached=True):
            found = self.placement.allocate(packed)
        if found is None and self._lacking(packed) <= 0 and self.placement.compact(self._entries.values()):
            found = self.placement.allocate(packed)
        if found is not None:
            entry.block, entry.filling = found.start, tuple(found.new)
            self._entries[entry.digest] = entry
        return found

    def drop(self, entry: Entry) -> None:
        """Take an entry out of the tables and the arena, as far as it is there."""
        if entry.handle >= 0:
            self._installer.uninstall(entry)
            entry.handle = entry.tail = -1
        self.placement.free(entry)
        self._entries.pop(entry.digest, None)

    def spare_bytes(self, protected: Collection[str]) -> int:
        """What give_room could free: the arena's free room, and the blocks of those that may be evicted."""
        return self.arena.free_bytes + self.placement.freed_by(self._evictable(protected))

    def give_room(self, nbytes: int, protected: Collection[str]) -> int:
        """Make the arena's free end ``nbytes`` long, or as long as can be: adapters that nobody references leave, but
        not protected ones, and blocks move down, a bounded number of bytes in each call.

        Returns its length in bytes now; the arena's capacity is the caller's.
        """
        while self.arena.free_bytes < nbytes and self._evict_one(protected):
            pass
        if self.arena.tail_bytes < min(nbytes, self.arena.free_bytes):
            self.placement.compact(self._entries.values())
        return self.arena.tail_bytes

    def _lacking(self, packed: PackedProgram) -> int:
        """Bytes that the free room, in however many pieces, is short of."""
        return self.placement.needed(packed) - self.arena.free_bytes

    def _ask_neighbour(self, packed: PackedProgram, *, cached: bool) -> bool:
        lacking = self._lacking(packed)
        return self.neighbour is not None and lacking > 0 and self.neighbour.give(lacking, cached=cached)

    def _eviction_helps(self, packed: PackedProgram, protected: Collection[str]) -> bool:
        spare = self.neighbour.spare_bytes if self.neighbour is not None else 0
        lacking = self._lacking(packed) - spare
        return lacking <= 0 or self.placement.freed_by(self._evictable(protected)) >= lacking

    def _evict_one(self, protected: Collection[str]) -> bool:
        coldest = self._policy.coldest(entry.digest for entry in self._evictable(protected))
        if coldest is None:
            return False
        entry = self._entries[coldest]
        self.drop(entry)
        self.evictions += 1
        self._evicted(entry)
        return True

    def _evictable(self, protected: Collection[str]) -> list[Entry]:
        return [
            entry
            for entry in self._entries.values()
            if entry.state is State.READY
            and entry.references == 0
            and entry.digest not in protected
            and entry.digest not in self.pinned
        ]
