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

        protected: digests that are not evicted. awaited: somebody needs it, so the neighbour is asked as well.
        """
        packed = entry.packed
        if packed is None:
            raise RuntimeError(f"adapter {entry.digest} is not in host memory")
        found = self.placement.allocate(packed)
        if found is None:
            self._make_room(packed, protected, awaited=awaited)
            found = self.placement.allocate(packed)
        if found is None and self._lacking(packed) <= 0 and self.placement.compact(self._entries.values()):
            found = self.placement.allocate(packed)
        if found is not None:
            entry.block, entry.filling = found.start, tuple(found.new)
            self._entries[entry.digest] = entry
        return found

    def has_bytes(self, entry: Entry) -> bool:
        """Whether there is room for a packed entry, be it in pieces: then some steps of compaction will place it."""
        return entry.packed is not None and self._lacking(entry.packed) <= 0

    def drop(self, entry: Entry) -> None:
        """Take an entry out of the tables and the arena, as far as it is there."""
        if entry.handle >= 0:
            self._installer.uninstall(entry)
            entry.handle = entry.tail = -1
        self.placement.free(entry)
        self._entries.pop(entry.digest, None)

    def spare_bytes(self, protected: Collection[str]) -> int:
        """What give_room could free: the arena's free room, and the blocks of those that may be evicted."""
        return self.arena.free_bytes + self._could_free(protected)

    def give_room(self, nbytes: int, protected: Collection[str]) -> int:
        """Make the arena's free end ``nbytes`` long, or as long as can be: adapters that nobody references leave, but
        not protected ones, and blocks move down, a bounded number of bytes in each call.

        Returns its length in bytes now; the arena's capacity is the caller's.
        """
        self._evict_while(lambda: self.arena.free_bytes < nbytes, protected)
        if self.arena.tail_bytes < min(nbytes, self.arena.free_bytes):
            self.placement.compact(self._entries.values())
        return self.arena.tail_bytes

    def _make_room(self, packed: PackedProgram, protected: Collection[str], *, awaited: bool) -> None:
        """Bytes enough, cheapest first, in however many pieces: compaction makes one range of them, over several steps
        where that is much. What the neighbour gives may take several steps as well; nobody is evicted meanwhile."""
        if awaited and self._ask_neighbour(packed, cached=False):
            return
        spare = self.neighbour.spare_bytes if awaited and self.neighbour is not None else 0
        if self._lacking(packed) > 0 and self._could_free(protected) + spare >= self._lacking(packed):
            self._evict_while(lambda: self._lacking(packed) > 0, protected)
        if awaited:
            self._ask_neighbour(packed, cached=True)

    def _lacking(self, packed: PackedProgram) -> int:
        """Bytes that the free room, in however many pieces, is short of."""
        return self.placement.needed(packed) - self.arena.free_bytes

    def _ask_neighbour(self, packed: PackedProgram, *, cached: bool) -> bool:
        lacking = self._lacking(packed)
        return self.neighbour is not None and lacking > 0 and self.neighbour.give(lacking, cached=cached)

    def _could_free(self, protected: Collection[str]) -> int:
        return self.placement.freed_by(self._evictable(protected))

    def _evict_while(self, lacking: Callable[[], bool], protected: Collection[str]) -> None:
        """The coldest first, as long as bytes are lacking and somebody may go."""
        if not lacking():
            return
        for digest in self._policy.coldest_first(entry.digest for entry in self._evictable(protected)):
            self._evict(self._entries[digest])
            if not lacking():
                return

    def _evict(self, entry: Entry) -> None:
        self.drop(entry)
        self.evictions += 1
        self._evicted(entry)

    def _evictable(self, protected: Collection[str]) -> list[Entry]:
        return [
            entry
            for entry in self._entries.values()
            if entry.state is State.READY
            and entry.references == 0
            and entry.digest not in protected
            and entry.digest not in self.pinned
        ]
