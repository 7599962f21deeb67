"""Which adapters are where: disk -> host -> device. Threads do the work; the engine's loop allocates and flips entries.

States of an entry:   compiling -> placing -> copying -> ready        (failed at any step but the last)
    compiling  a thread reads its compiled form, or compiles and packs it, in host memory
    placing    packed, waiting for room in the arena
    copying    a thread (and on CUDA a side stream) copies it into its block
    ready      in the tables; may be acquired

An adapter that leaves the device starts at ``placing`` the next time, where host memory still has it. All methods are
called by the engine's thread. References are held by running sequences; who is evicted otherwise: policy.py.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

from onebase.adapters.arena import Arena
from onebase.adapters.compiled import CompiledForms
from onebase.adapters.device import DeviceTier
from onebase.adapters.entry import Entry, State
from onebase.adapters.errors import AdapterError, AdapterRejected, AdapterTooLarge
from onebase.adapters.fetching import Compile, Fetcher
from onebase.adapters.host import HostTier
from onebase.adapters.installer import Installer
from onebase.adapters.loader import Loader
from onebase.adapters.meters import LoadMeters
from onebase.adapters.packing import PackedProgram
from onebase.adapters.pins import Pins
from onebase.adapters.policy import Lrfu
from onebase.adapters.shared_blocks import SharedBlocks
from onebase.adapters.traits import Traits
from onebase.kernels.base import LowRankKernels
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.tables import ProgramTables


class AdapterCache:
    """The tiers. hits, misses: requests that started, and found their adapter ready or had to wait for its load."""

    def __init__(
        self,
        arena: Arena,
        tables: ProgramTables,
        kernels: LowRankKernels,
        instructions: InstructionTable,
        site_index: Mapping[str, int],
        compile: Compile,
        *,
        forms: CompiledForms | None = None,
        host_bytes: int = 0,
    ) -> None:
        """forms: of the disk tier, None for none. host_bytes: the host tier's budget."""
        self.arena = arena
        self.shared = SharedBlocks(arena)
        self.policy = Lrfu()
        self.host = HostTier(host_bytes, self.policy, evicted=self._forget)
        self.fetcher = Fetcher(compile, forms, arena.buffer.dtype, pinned=arena.buffer.is_cuda)
        self.forms = forms
        self.pins = Pins()
        self.meters = LoadMeters()
        self.blocked = False
        self.loads = self.hits = self.misses = self.num_references = 0
        self._installer = Installer(arena.buffer, self.shared, tables, kernels, instructions, site_index)
        self.device = DeviceTier(arena, self.shared, self._installer, self.policy, evicted=self._remove)
        self._loader = Loader(arena.buffer)
        self._reads = self._read_bytes = 0
        self._entries: dict[str, Entry] = {}
        self._moving: dict[str, Entry] = {}  # those that are not ready
        if forms is not None:
            self._loader.submit(forms.survey)

    # What is where

    @property
    def busy(self) -> bool:
        """Whether a thread is at work, or has just filled what an entry waits for, so that collect() will have
        something to do soon."""
        return any(entry.working or entry.state is State.COPYING for entry in self._moving.values())

    @property
    def num_compiling(self) -> int:
        return sum(entry.state is State.COMPILING for entry in self._moving.values())

    def resident(self) -> dict[str, int]:
        """digest -> bytes on the device."""
        return {entry.digest: entry.nbytes for entry in self.device.entries if entry.state is State.READY}

    @property
    def mean_bytes(self) -> int:
        """What an adapter takes on the device, on average of those that came to host memory so far."""
        return self._read_bytes // max(self._reads, 1)

    def running(self) -> set[str]:
        """Digests that running sequences hold references on."""
        return {entry.digest for entry in self.device.entries if entry.references}

    def is_ready(self, digest: str) -> bool:
        """Whether the adapter may be acquired. One that is being unloaded may not: it comes back as a new entry."""
        entry = self._entries.get(digest)
        return entry is not None and entry.state is State.READY and not entry.doomed

    def is_known(self, digest: str) -> bool:
        """Whether it is in some tier above the disk, or on its way there."""
        return digest in self._entries or digest in self.host

    def is_leaving(self, digest: str) -> bool:
        """Whether an adapter that was unloaded is still here, for its last request or the end of a copy."""
        entry = self._entries.get(digest)
        return entry is not None and entry.doomed

    def parts(self, digest: str) -> dict[str, int]:
        """Block -> bytes of all that the adapter takes on the device, empty while that is not known. Adapters that
        share a block have the same key for it, so that the union of their parts is what they take together."""
        entry, size = self._entries.get(digest), self.arena.block_bytes
        if entry is not None and entry.state not in (State.COMPILING, State.FAILED):
            return {digest: size(entry.num_elements)} | {key: size(count) for key, count in entry.shared.items()}
        packed = self.host.get(digest)
        if packed is None:
            return {}
        return {digest: size(packed.data.numel())} | {key: size(flat.numel()) for key, flat in packed.shared.items()}

    def traits(self, digest: str) -> Traits | None:
        """What the engine has to know of a compiled adapter, None while it is not compiled."""
        entry = self._entries.get(digest)
        if entry is not None and entry.state not in (State.COMPILING, State.FAILED):
            return entry.traits
        packed = self.host.get(digest)
        return None if packed is None else packed.traits

    # What is asked for

    def fetch(self, digest: str, path: str) -> Entry:
        """The entry of an adapter that is to go to the device as soon as it has room; starts to load it where it is not
        on its way already."""
        entry = self._entry(digest, path)
        entry.wants_room = True
        return entry

    def await_ready(self, digest: str, path: str) -> None:
        """Start to load an adapter that a request waits for. It goes to the device once it is planned there."""
        entry = self._entry(digest, path)
        entry.awaited = entry.awaited or entry.state is not State.READY

    def _entry(self, digest: str, path: str) -> Entry:
        entry = self._entries.get(digest)
        if entry is not None and entry.state is not State.FAILED:
            return entry
        entry = Entry(digest, path, State.COMPILING, asked_at=time.monotonic())
        self._entries[digest] = self._moving[digest] = entry
        self.policy.know(digest)
        packed = self.host.look(digest)
        if packed is not None:
            entry.take(packed)
        else:
            entry.reading = self._loader.submit(self.fetcher.fetch, Path(path), digest)
        return entry

    def acquire(self, digest: str) -> Entry:
        """Take a reference on a ready entry. Its handle may change between steps: compaction moves blocks."""
        entry = self._entries[digest]
        if entry.state is not State.READY:
            raise RuntimeError(f"adapter {digest} is {entry.state}, not ready")
        self.policy.use(digest)
        self.misses += entry.awaited
        self.hits += not entry.awaited
        entry.awaited = False
        entry.references += 1
        self.num_references += 1
        return entry

    def release(self, digest: str) -> None:
        """Give a reference back; a doomed entry leaves with its last one."""
        entry = self._entries[digest]
        entry.references -= 1
        self.num_references -= 1
        if entry.doomed and entry.references == 0:
            self._drop(entry)

    def unload(self, digest: str) -> bool:
        """Drop an adapter from host and device, now or with its last reference. False where it is in neither."""
        was_in_host = digest in self.host
        self.host.drop(digest)
        entry = self._entries.get(digest)
        if entry is None or entry.state is State.FAILED:
            self._forget(digest)
            return was_in_host
        entry.doomed = True
        if entry.references == 0 and not entry.working:
            self._drop(entry)
        return True

    def set_pins(self, paths: Mapping[str, str]) -> None:
        """These adapters, digest -> blob folder, are loaded and not evicted; no others are."""
        self.pins.replace(paths)

    # Moving on

    def collect(self, wanted: Collection[str] = ()) -> list[Entry]:
        """Take up what threads have done; the entries that are now known to be good (compiled, and small enough) or
        failed. wanted: digests that host memory keeps, because requests wait for them."""
        changed: list[Entry] = []
        for entry in list(self._moving.values()):
            before = entry.state
            self._advance(entry, wanted)
            if entry.state is State.FAILED or (before is State.COMPILING and entry.state is not State.COMPILING):
                changed.append(entry)
        for entry in changed:
            if entry.state is State.FAILED:
                self.pins.fail(entry.digest)
                self._remove(entry)
        return changed

    def place(self, planned: Mapping[str, bool] | None = None, wanted: Collection[str] = ()) -> None:
        """Give room to those that want it.

        planned: the digests that requests are to find on the device, in their order, and whether there is room now;
        these are not evicted for others. Those without wait for room in their order. ``blocked`` says whether any has
        no place yet. What else found no room is dropped unless it is pinned, or ``wanted`` and not in host memory.
        """
        planned = planned or {}
        reserved = {digest for digest, has_room in planned.items() if has_room}
        self.device.pinned = self._fetch_pins()
        self.blocked = False
        for digest, has_room in planned.items():
            entry = self._moving.get(digest)
            if entry is not None and entry.state is State.PLACING and (has_room or not self.blocked):
                self._place(entry, reserved, awaited=True)
            self.blocked |= entry is not None and entry.block < 0
        for entry in [e for e in self._moving.values() if e.state is State.PLACING and e.digest not in planned]:
            placed = entry.wants_room and self._place(entry, reserved, awaited=False)
            needed = entry.digest in wanted and entry.digest not in self.host
            if not placed and not needed and entry.digest not in self.device.pinned:
                self._remove(entry)

    def _fetch_pins(self) -> Mapping[str, str]:
        """Start the loads of pins; those that have room on the device."""
        if not self.pins.paths:
            return {}
        for digest in self.pins.paths:
            self.pins.know(digest, self.parts(digest))
        pins, _ = self.pins.within(self.arena.limit_bytes)
        for digest, path in pins.items():
            if digest not in self._entries and self.num_compiling < 2:
                self.fetch(digest, path)
        return pins

    def _advance(self, entry: Entry, wanted: Collection[str]) -> None:
        if entry.reading is not None and entry.reading.done():
            self._read(entry, wanted)
        elif entry.copying is not None and entry.copying.done():
            self._copied(entry)
        if entry.working or entry.state is State.FAILED:
            return
        if entry.doomed and entry.references == 0:
            self._drop(entry)
        elif entry.state is State.COPYING:
            self._make_ready(entry)

    def _read(self, entry: Entry, wanted: Collection[str]) -> None:
        reading, entry.reading = entry.reading, None
        assert reading is not None
        try:
            fetched = reading.result()
        except AdapterError as error:
            return entry.fail(error)
        except Exception as error:  # a hostile file must not end the loop, whatever a library makes of it
            return entry.fail(AdapterRejected(f"the adapter cannot be read: {type(error).__name__}: {error}"))
        self.meters.add(fetched.step, fetched.seconds)
        needed = self._bytes_of(fetched.packed)
        self._reads, self._read_bytes = self._reads + 1, self._read_bytes + needed
        if needed > self.arena.limit_bytes:
            message = f"the adapter takes {needed} bytes, the device budget for adapters is {self.arena.limit_bytes}"
            return entry.fail(AdapterTooLarge(message))
        packed = fetched.packed
        if not entry.doomed:
            packed = self.host.put(packed, {*wanted, *self.pins.paths, *self._moving})
        return entry.take(packed)

    def _bytes_of(self, packed: PackedProgram) -> int:
        return sum(self.arena.block_bytes(part.numel()) for part in (packed.data, *packed.shared.values()))

    def _place(self, entry: Entry, protected: Collection[str], *, awaited: bool) -> bool:
        found = None if entry.doomed else self.device.place(entry, protected, awaited=awaited)
        if found is None or entry.packed is None:
            return False
        entry.state = State.COPYING
        targets = {found.start: entry.packed.data}
        targets |= {start: entry.packed.shared[key] for key, start in found.new.items()}
        starts = self.shared.starts(entry.shared)
        entry.copying = self._loader.copy(targets, partial(self._installer.prepare, entry, found.start, starts))
        return True

    def _copied(self, entry: Entry) -> None:
        copying, entry.copying, entry.packed = entry.copying, None, None
        assert copying is not None
        failed = copying.exception()
        self.shared.filled(entry.filling, broken=failed is not None)
        if failed is not None:  # the block holds anything now
            return self._give_up(entry, failed)
        copied = copying.result()
        entry.installable = copied.installable
        return self.meters.add("copy", copied.seconds)

    def _make_ready(self, entry: Entry) -> None:
        if not self.shared.are_filled(entry.shared):
            return None  # another adapter's copy is filling what this one shares
        if self.shared.any_broken(entry.shared):
            return self._give_up(entry, "what it shares with another one could not be copied")
        self._installer.install(entry)
        entry.state = State.READY
        del self._moving[entry.digest]
        self.loads += 1
        return self.meters.add("wait", time.monotonic() - entry.asked_at)

    def _give_up(self, entry: Entry, reason: object) -> None:
        self.device.drop(entry)
        entry.fail(AdapterError(f"the adapter could not be copied to the device: {reason}"))

    def _drop(self, entry: Entry) -> None:
        self.device.drop(entry)
        self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.digest]
        self._moving.pop(entry.digest, None)
        self._forget(entry.digest)

    def _forget(self, digest: str) -> None:
        """Its uses count as long as some tier has it."""
        if digest not in self._entries and digest not in self.host:
            self.policy.forget(digest)

    def check(self) -> None:
        """Prove that blocks, entries and host memory agree. Raises RuntimeError where they do not."""
        self.arena.check()
        self.host.check()
        held = sum(1 for entry in self._entries.values() if entry.block >= 0)
        if held != len(self.device.entries) or held + len(self.shared) != self.arena.num_blocks:
            raise RuntimeError(
                f"adapters: {held} entries hold blocks, {len(self.shared)} are shared, the arena has "
                f"{self.arena.num_blocks}, the device tier {len(self.device.entries)}"
            )
        users = sum(len(entry.shared) for entry in self._entries.values() if entry.block >= 0)
        if users != self.shared.num_references:
            raise RuntimeError(f"adapters: {users} uses of shared blocks, counted {self.shared.num_references}")
        references = [entry.references for entry in self._entries.values()]
        if min(references, default=0) < 0 or sum(references) != self.num_references:
            raise RuntimeError(f"adapters: references {references}, counted {self.num_references}")
        if {d for d, e in self._entries.items() if e.state is not State.READY} != self._moving.keys():
            raise RuntimeError("adapters: those that are not ready are not those that move")

    def close(self) -> None:
        self._loader.close()
