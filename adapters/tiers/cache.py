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

import math
import time
from collections.abc import Collection, Mapping

from onebase.adapters.tiers.arena import Arena
from onebase.adapters.tiers.compiled import CompiledForms
from onebase.adapters.tiers.device import DeviceTier
from onebase.adapters.tiers.entry import Entry, State
from onebase.adapters.tiers.fetching import Compile, Fetcher
from onebase.adapters.tiers.host import HostTier
from onebase.adapters.tiers.installer import Installer
from onebase.adapters.tiers.pins import Pins
from onebase.adapters.tiers.policy import Lrfu
from onebase.adapters.tiers.shared_blocks import SharedBlocks
from onebase.adapters.tiers.transit import Transit
from onebase.adapters.traits import Traits
from onebase.kernels.base import LowRankKernels
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.tables import ProgramTables

_PINS_AT_ONCE = 2  # on their way to host memory
_SURVEY_EVERY = 60.0  # seconds; ten thousand files take a thread some 0.1 s


class AdapterCache:
    """The tiers. hits, misses: requests that started, and found their adapter ready or had to wait for its load.
    blocked: whether an adapter that is planned onto the device has no place there yet."""

    def __init__(
        self,
        arena: Arena,
        tables: ProgramTables,
        kernels: LowRankKernels,
        instructions: InstructionTable,
        site_index: Mapping[str, int],
        compile: Compile,
        *,
        linears: frozenset[str] = frozenset(),
        forms: CompiledForms | None = None,
        host_bytes: int = 0,
    ) -> None:
        """linears: the paths of linear modules among the sites. forms: of the disk tier, None for none. host_bytes: the
        host tier's budget."""
        self.arena = arena
        self.shared = SharedBlocks(arena)
        self.policy = Lrfu()
        self.host = HostTier(host_bytes, self.policy, evicted=self._forget)
        self.forms = forms
        self.pins = Pins()
        self.blocked = False
        self.hits = self.misses = self.num_references = 0
        installer = Installer(arena.buffer, self.shared, tables, kernels, instructions, site_index, linears)
        self.device = DeviceTier(arena, self.shared, installer, self.policy, evicted=self._evicted)
        fetcher = Fetcher(compile, forms, arena.buffer.dtype, pinned=arena.buffer.is_cuda)
        self.transit = Transit(fetcher, self.device, self.host, self.shared, installer, left=self._forget)
        self._entries, self._moving = self.transit.entries, self.transit.moving
        self._surveyed = -math.inf
        self.survey()

    # What is where

    @property
    def busy(self) -> bool:
        """Whether collect() or place() will have something to do soon: a thread is at work, or has just filled what an
        entry waits for, or room is made step by step for a pin or for what a command loads."""
        return any(map(self._comes_soon, self._moving.values()))

    def _comes_soon(self, entry: Entry) -> bool:
        if entry.working or entry.state is State.COPYING or entry.digest in self.device.pinned:
            return True
        return entry.wants_room and self.device.has_bytes(entry)

    @property
    def num_compiling(self) -> int:
        """Adapters that requests wait for, on their way to host memory."""
        return self.transit.num_awaited

    @property
    def ready(self) -> Collection[str]:
        """Digests of the adapters that may be acquired; a view, which changes with them."""
        return self.transit.ready.keys()

    def resident(self) -> dict[str, int]:
        """digest -> bytes on the device."""
        return {digest: entry.nbytes for digest, entry in self.transit.ready.items()}

    def running(self) -> set[str]:
        """Digests that running sequences hold references on."""
        return {entry.digest for entry in self.device.entries if entry.references}

    def is_ready(self, digest: str) -> bool:
        """Whether the adapter may be acquired. One that is to leave may be, as long as somebody keeps it here."""
        return digest in self.transit.ready

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
        if entry is not None and entry.state is not State.COMPILING:
            return {digest: size(entry.num_elements)} | {key: size(count) for key, count in entry.shared.items()}
        packed = self.host.get(digest)
        if packed is None:
            return {}
        return {digest: size(packed.data.numel())} | {key: size(flat.numel()) for key, flat in packed.shared.items()}

    def traits(self, digest: str) -> Traits | None:
        """What the engine has to know of a compiled adapter, None while it is not compiled."""
        entry = self._entries.get(digest)
        if entry is not None and entry.state is not State.COMPILING:
            return entry.traits
        packed = self.host.get(digest)
        return None if packed is None else packed.traits

    def survey(self) -> None:
        """Have the compiled forms on disk counted, now and then: the server deletes them with their adapters."""
        if self.forms is not None and time.monotonic() - self._surveyed > _SURVEY_EVERY:
            self._surveyed = time.monotonic()
            self.transit.loader.submit(self.forms.survey)

    # What is asked for

    def fetch(self, digest: str, path: str) -> Entry:
        """The entry of an adapter that is to go to the device as soon as it has room; starts to load it where it is not
        on its way already."""
        entry = self._entry(digest, path)
        entry.wants_room = True
        return entry

    def await_ready(self, digest: str, path: str) -> None:
        """Start to load an adapter that a request waits for. It goes to the device once it is planned there."""
        self.transit.await_ready(self._entry(digest, path))

    def _entry(self, digest: str, path: str) -> Entry:
        entry = self._entries.get(digest)
        if entry is None:
            self.policy.know(digest)
            entry = self.transit.start(digest, path)
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
            self.transit.drop(entry)

    def unload(self, digest: str) -> bool:
        """Drop an adapter from host and device, now or with its last reference. False where it is in neither."""
        was_in_host = digest in self.host
        self.host.drop(digest)
        entry = self._entries.get(digest)
        if entry is None:
            self._forget(digest)
            return was_in_host
        entry.doomed = True
        if entry.references == 0 and not entry.working:
            self.transit.drop(entry)
        return True

    def set_pins(self, paths: Mapping[str, str]) -> None:
        """These adapters, digest -> blob folder, are loaded and not evicted; no others are."""
        self.pins.replace(paths)

    # Moving on

    def collect(self, wanted: Collection[str] = ()) -> list[Entry]:
        """A step begins: take up what threads have done. The entries that are now known to be good (compiled, and small
        enough) or failed. wanted: digests that host memory keeps, because requests wait for them."""
        self.device.placement.begin_step()
        changed: list[Entry] = []
        protected = {*wanted, *self._moving, *(pin for pin in self.pins.paths if pin not in self._entries)}
        for entry in list(self._moving.values()):
            before = entry.state
            self.transit.advance(entry, protected)
            if entry.state is State.FAILED or (before is State.COMPILING and entry.state is not State.COMPILING):
                changed.append(entry)
        for entry in changed:
            if entry.state is State.FAILED:
                if entry.error is not None:
                    self.pins.fail(entry.digest, entry.error)
                self.transit.remove(entry)
        return changed

    def place(self, planned: Mapping[str, bool] | None = None, wanted: Collection[str] = ()) -> None:
        """Give room to those that want it: pins before all others.

        planned: the digests that requests are to find on the device, in their order, and whether there is room now,
        beside the pins; these are not evicted for others. Those without wait for room in their order, and nobody else
        gets any before them. What else found no room is dropped unless it is pinned or ``wanted``.
        """
        planned = planned or {}
        reserved = {digest for digest, has_room in planned.items() if has_room}
        self.device.pinned = pins = self._fetch_pins()
        placed = [self._place(digest, reserved) for digest in pins]
        self.blocked = False
        for digest, has_room in planned.items():
            if digest not in pins and (has_room or not self.blocked):
                placed.append(self._place(digest, reserved))
            self.blocked |= digest in self._entries and self._entries[digest].block < 0
        for entry in [e for e in self._moving.values() if e.state is State.PLACING and e.digest not in planned]:
            self._place_unasked(entry, reserved, wanted, room=all(placed))

    def _place(self, digest: str, reserved: Collection[str]) -> bool:
        """Room for an adapter that somebody waits for; False where it needs some and there is none yet."""
        entry = self._moving.get(digest)
        return entry is None or entry.state is not State.PLACING or self.transit.place(entry, reserved, awaited=True)

    def _place_unasked(self, entry: Entry, reserved: Collection[str], wanted: Collection[str], *, room: bool) -> None:
        """For one that is not planned: it goes where there is room, or is dropped; who needs it later plans it."""
        if entry.digest in self.device.pinned:
            return
        asks = room and entry.wants_room
        kept = asks and (self.transit.place(entry, reserved, awaited=False) or self.device.has_bytes(entry))
        if not kept and entry.digest not in wanted:
            self.transit.remove(entry)

    def _fetch_pins(self) -> Mapping[str, str]:
        """Start the loads of pins, a few at a time, whatever requests have loaded; those that have room on the
        device."""
        if not self.pins.paths:
            return {}
        for digest in self.pins.paths:
            self.pins.know(digest, self.parts(digest))
            if self.is_ready(digest):
                self.pins.arrive(digest)
        pins, _ = self.pins.within(self.arena.limit_bytes)
        coming = sum(digest in self._entries and self._entries[digest].state is State.COMPILING for digest in pins)
        missing = [digest for digest in pins if digest not in self._entries]
        for digest in missing[: max(0, _PINS_AT_ONCE - coming)]:
            self.transit.hasten(self.fetch(digest, pins[digest]))
        return pins

    def _evicted(self, entry: Entry) -> None:
        self.transit.remove(entry)

    def _forget(self, digest: str) -> None:
        """Its uses count as long as some tier has it."""
        if digest not in self._entries and digest not in self.host:
            self.policy.forget(digest)

    def check(self) -> None:
        """Prove that blocks, entries and host memory agree. Raises RuntimeError where they do not."""
        self.arena.check()
        self.host.check()
        self.transit.check()
        references = [entry.references for entry in self._entries.values()]
        if min(references, default=0) < 0 or sum(references) != self.num_references:
            raise RuntimeError(f"adapters: references {references}, counted {self.num_references}")

    def close(self) -> None:
        self.transit.loader.close()
