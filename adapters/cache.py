"""Which adapters are on the device. Loads run in a thread; the engine's loop only allocates and flips table entries.

States of an entry:   compiling -> placing -> copying -> ready        (failed at any step but the last)
    compiling  a thread reads the blob and packs its program in host memory
    placing    packed, waiting for room in the arena
    copying    a thread (and on CUDA a side stream) copies it into its block
    ready      in the tables; may be acquired

All methods are called by the engine's thread. References are held by running sequences; unreferenced entries are
evicted in order of last use when another adapter needs the room.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from onebase.adapters.arena import Arena, Neighbour
from onebase.adapters.entry import Entry, State
from onebase.adapters.errors import AdapterError, AdapterRejected, AdapterTooLarge
from onebase.adapters.installer import Installer
from onebase.adapters.loader import Loader
from onebase.adapters.packing import PackedProgram, pack
from onebase.adapters.placement import Placement
from onebase.adapters.program import AdapterProgram
from onebase.adapters.shared_blocks import SharedBlocks
from onebase.adapters.traits import Traits
from onebase.kernels.base import LowRankKernels
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.tables import ProgramTables

Compile = Callable[[Path, str], AdapterProgram]  # (blob folder, digest) -> program; raises AdapterError


class AdapterCache:
    """The device tier."""

    def __init__(
        self,
        arena: Arena,
        tables: ProgramTables,
        kernels: LowRankKernels,
        instructions: InstructionTable,
        site_index: Mapping[str, int],
        compile: Compile,
    ) -> None:
        self.arena = arena
        self.shared = SharedBlocks(arena)
        self.loads = 0
        self.evictions = 0
        self.blocked = False
        self.neighbour: Neighbour | None = None  # who may give the arena more room, and take some of it
        self._compile = compile
        self._entries: dict[str, Entry] = {}
        self._pins: dict[str, str] = {}
        self._clock = 0
        self._installer = Installer(arena.buffer, self.shared, tables, kernels, instructions, site_index)
        self._loader = Loader(arena.buffer)
        self.placement = Placement(arena, self.shared, self._installer)

    @property
    def busy(self) -> bool:
        """Whether a thread is at work, or has just filled what an entry waits for, so that poll() will have something
        to do soon."""
        return any(entry.work is not None or entry.state is State.COPYING for entry in self._entries.values())

    @property
    def num_compiling(self) -> int:
        return sum(entry.state is State.COMPILING for entry in self._entries.values())

    @property
    def num_references(self) -> int:
        """References held by running sequences."""
        return sum(entry.references for entry in self._entries.values())

    @property
    def reach_bytes(self) -> int:
        """What the arena can have now: what it has, and what its neighbour could give."""
        return self.arena.capacity_bytes + (0 if self.neighbour is None else self.neighbour.spare_bytes)

    def resident(self) -> dict[str, int]:
        """digest -> bytes on the device."""
        return {entry.digest: entry.nbytes for entry in self._entries.values() if entry.state is State.READY}

    def fetch(self, digest: str, path: str) -> Entry:
        """The entry of an adapter; starts to load it where it is not on its way already."""
        self._clock += 1
        entry = self._entries.get(digest)
        if entry is None or entry.state is State.FAILED:
            entry = self._entries[digest] = Entry(digest, path, State.COMPILING)
            entry.work = self._loader.submit(self._load, Path(path), digest)
        entry.last_used = self._clock
        return entry

    def is_ready(self, digest: str) -> bool:
        """Whether the adapter may be acquired. One that is being unloaded may not: it comes back as a new entry."""
        entry = self._entries.get(digest)
        return entry is not None and entry.state is State.READY and not entry.doomed

    def size(self, digest: str) -> int | None:
        """Bytes of the adapter's own block, None while they are not known. What it shares is held once for all."""
        entry = self._entries.get(digest)
        if entry is None or entry.state not in (State.PLACING, State.COPYING, State.READY):
            return None
        return self.arena.block_bytes(entry.num_elements)

    def parts(self, digest: str) -> dict[str, int]:
        """Block -> bytes of all that the adapter takes, empty while that is not known. Adapters that share a block have
        the same key for it, so that the union of their parts is what they take together."""
        size = self.size(digest)
        if size is None:
            return {}
        shared = self._entries[digest].shared
        return {digest: size, **{key: self.arena.block_bytes(count) for key, count in shared.items()}}

    def traits(self, digest: str) -> Traits | None:
        """What the engine has to know of a compiled adapter, None while it is not compiled."""
        return None if self.size(digest) is None else self._entries[digest].traits

    def acquire(self, digest: str) -> Entry:
        """Take a reference on a ready entry. Its handle may change between steps: compaction moves blocks."""
        entry = self._entries[digest]
        if entry.state is not State.READY:
            raise RuntimeError(f"adapter {digest} is {entry.state}, not ready")
        self._clock += 1
        entry.last_used = self._clock
        entry.references += 1
        return entry

    def release(self, digest: str) -> None:
        """Give a reference back; a doomed entry leaves with its last one."""
        entry = self._entries[digest]
        entry.references -= 1
        if entry.doomed and entry.references == 0:
            self._drop(entry)

    def unload(self, digest: str) -> bool:
        """Drop an adapter now, or with its last reference. False where it is not here."""
        entry = self._entries.get(digest)
        if entry is None or entry.state is State.FAILED:
            return False
        entry.doomed = True
        if entry.references == 0 and entry.work is None:
            self._drop(entry)
        return True

    def is_leaving(self, digest: str) -> bool:
        """Whether an adapter that was unloaded is still here, for its last request or the end of a copy."""
        entry = self._entries.get(digest)
        return entry is not None and entry.doomed

    def set_pins(self, paths: Mapping[str, str]) -> None:
        """These adapters, digest -> blob folder, are loaded and not evicted; no others are."""
        self._pins = dict(paths)

    def poll(self, reserved: Collection[str] = ()) -> list[Entry]:
        """Move loads on; the entries that are now known to be good (compiled, and small enough) or failed.

        ``reserved`` digests are not evicted for others. ``blocked`` says whether one of them found no room.
        """
        changed: list[Entry] = []
        for digest, path in self._pins.items():
            if digest not in self._entries:
                self.fetch(digest, path)
        for entry in list(self._entries.values()):
            before = entry.state
            self._advance(entry, reserved)
            if entry.state is State.FAILED or (before is State.COMPILING and entry.state is not State.COMPILING):
                changed.append(entry)
        for entry in changed:
            if entry.state is State.FAILED:
                del self._entries[entry.digest]
        waiting = (entry.digest for entry in self._entries.values() if entry.state is State.PLACING)
        self.blocked = any(digest in reserved for digest in waiting)
        return changed

    def forget_unplaced(self, wanted: Collection[str]) -> None:
        """Drop packed programs that found no room and that nobody waits for any more."""
        for entry in list(self._entries.values()):
            if entry.state is State.PLACING and entry.digest not in wanted:
                self._drop(entry)

    def check(self) -> None:
        """Prove that blocks and entries agree. Raises RuntimeError where they do not."""
        self.arena.check()
        held = sum(1 for entry in self._entries.values() if entry.block >= 0)
        if held + len(self.shared) != self.arena.num_blocks:
            raise RuntimeError(
                f"adapters: {held} entries hold blocks, {len(self.shared)} are shared, the arena has "
                f"{self.arena.num_blocks}"
            )
        users = sum(len(entry.shared) for entry in self._entries.values() if entry.block >= 0)
        if users != self.shared.num_references:
            raise RuntimeError(f"adapters: {users} uses of shared blocks, counted {self.shared.num_references}")
        if any(entry.references < 0 for entry in self._entries.values()):
            raise RuntimeError("adapters: a reference was given back twice")

    def close(self) -> None:
        self._loader.close()

    def _load(self, path: Path, digest: str) -> PackedProgram:
        program = self._compile(path, digest)
        return pack(program, self.arena.buffer.dtype, pinned=self.arena.buffer.is_cuda)

    def _advance(self, entry: Entry, reserved: Collection[str]) -> None:
        if entry.work is not None and not entry.work.done():
            return
        if entry.state is State.COMPILING:
            self._compiled(entry)
        elif entry.state is State.COPYING and entry.work is not None:
            self._copied(entry)
        if entry.doomed and entry.references == 0 and entry.state is not State.FAILED:
            self._drop(entry)
        elif entry.state is State.PLACING:
            self._place(entry, reserved)
        elif entry.state is State.COPYING:
            self._make_ready(entry)

    def _compiled(self, entry: Entry) -> None:
        future, entry.work = entry.work, None
        try:
            packed = future.result()  # type: ignore[union-attr]
        except AdapterError as error:
            return _fail(entry, error)
        except Exception as error:  # a hostile file must not end the loop, whatever a library makes of it
            return _fail(entry, AdapterRejected(f"the adapter cannot be read: {type(error).__name__}: {error}"))
        assert packed is not None
        parts = (packed.data, *packed.shared.values())
        needed = sum(self.arena.block_bytes(part.numel()) for part in parts)
        if needed > self.arena.limit_bytes:
            message = f"the adapter takes {needed} bytes, the device budget for adapters is {self.arena.limit_bytes}"
            return _fail(entry, AdapterTooLarge(message))
        entry.packed, entry.state = packed, State.PLACING
        entry.operands, entry.extra, entry.num_elements = packed.operands, packed.extra, packed.data.numel()
        entry.packed_head = packed.head
        entry.shared = {key: part.numel() for key, part in packed.shared.items()}
        entry.traits = packed.traits
        entry.family, entry.rank = packed.family, packed.rank
        entry.nbytes, entry.sites = packed.nbytes, packed.sites
        return None

    def _place(self, entry: Entry, reserved: Collection[str]) -> None:
        assert entry.packed is not None
        placement = self.placement
        found, awaited = placement.allocate(entry.packed), entry.digest in reserved
        if found is None and awaited and self._ask_neighbour(entry.packed, cached=False):
            found = placement.allocate(entry.packed)
        while found is None and self._evict_one(reserved):
            found = placement.allocate(entry.packed)
        if found is None and awaited and self._ask_neighbour(entry.packed, cached=True):
            found = placement.allocate(entry.packed)
        if found is None and placement.has_room(entry.packed) and placement.compact(self._entries.values()):
            found = placement.allocate(entry.packed)
        if found is not None:
            entry.block, entry.filling = found.start, tuple(found.new)
            entry.state = State.COPYING
            targets = {found.start: entry.packed.data}
            targets |= {start: entry.packed.shared[key] for key, start in found.new.items()}
            entry.work = self._loader.copy(targets)

    def _ask_neighbour(self, packed: PackedProgram, *, cached: bool) -> bool:
        """Have the arena made longer by what its free room, in however many pieces, is short of. Whether it was."""
        lacking = self.placement.needed(packed) - self.arena.free_bytes
        return self.neighbour is not None and lacking > 0 and self.neighbour.give(lacking, cached=cached)

    def spare_bytes(self, reserved: Collection[str]) -> int:
        """What give_room could free: the arena's free room, and the blocks of those that may be evicted."""
        spare = (entry.num_elements for entry in self._entries.values() if self._may_leave(entry, reserved))
        return self.arena.free_bytes + sum(map(self.arena.block_bytes, spare))

    def give_room(self, nbytes: int, reserved: Collection[str] = ()) -> int:
        """Make the arena's free end ``nbytes`` long, or as long as can be: adapters that nobody references leave, but
        not ``reserved`` ones, and blocks move down. Its length in bytes now; the arena's capacity is the caller's."""
        while self.arena.free_bytes < nbytes and self._evict_one(reserved):
            pass
        if self.arena.tail_bytes < min(nbytes, self.arena.free_bytes):
            self.placement.compact(self._entries.values())
        return self.arena.tail_bytes

    def _copied(self, entry: Entry) -> None:
        future, entry.work, entry.packed = entry.work, None, None
        failed = future.exception()  # type: ignore[union-attr]
        self.shared.filled(entry.filling, broken=failed is not None)
        if failed is not None:  # the block holds anything now
            self._give_up(entry, failed)

    def _make_ready(self, entry: Entry) -> None:
        if not self.shared.are_filled(entry.shared):
            return None  # another adapter's copy is filling what this one shares
        if self.shared.any_broken(entry.shared):
            return self._give_up(entry, "what it shares with another one could not be copied")
        self._installer.install(entry)
        entry.state = State.READY
        self.loads += 1
        return None

    def _give_up(self, entry: Entry, reason: object) -> None:
        self.placement.free(entry)
        _fail(entry, AdapterError(f"the adapter could not be copied to the device: {reason}"))

    def _evict_one(self, reserved: Collection[str]) -> bool:
        free = [entry for entry in self._entries.values() if self._may_leave(entry, reserved)]
        if not free:
            return False
        self._drop(min(free, key=lambda entry: entry.last_used))
        self.evictions += 1
        return True

    def _may_leave(self, entry: Entry, reserved: Collection[str]) -> bool:
        kept = entry.references > 0 or entry.digest in reserved or entry.digest in self._pins
        return entry.state is State.READY and not kept

    def _drop(self, entry: Entry) -> None:
        if entry.handle >= 0:
            self._installer.uninstall(entry)
        self.placement.free(entry)
        del self._entries[entry.digest]


def _fail(entry: Entry, error: AdapterError) -> None:
    entry.state, entry.error, entry.work = State.FAILED, error, None
