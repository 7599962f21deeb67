"""Adapters on their way up: what threads have done is taken up, one state after the other.

Knows nothing of requests: who is to go where is said by the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from torch import OutOfMemoryError

from onebase.adapters.errors import AdapterRejected, AdapterTooLarge, EngineError, OneBaseError, StorageFailed
from onebase.adapters.packing import PackedProgram
from onebase.adapters.tiers.device import DeviceTier
from onebase.adapters.tiers.entry import Entry, State
from onebase.adapters.tiers.fetching import Fetched, Fetcher
from onebase.adapters.tiers.host import HostTier
from onebase.adapters.tiers.installer import Installer
from onebase.adapters.tiers.loader import Loader
from onebase.adapters.tiers.meters import LoadMeters
from onebase.adapters.tiers.shared_blocks import SharedBlocks


class Transit:
    """entries: of all adapters that are on the device or on their way; moving: those that are not ready, ready: the
    others. left: told of each that is in neither any more. loads: adapters that became ready, so far. num_awaited:
    reads under way that requests wait for."""

    def __init__(
        self,
        fetcher: Fetcher,
        device: DeviceTier,
        host: HostTier,
        shared: SharedBlocks,
        installer: Installer,
        left: Callable[[str], None],
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self.moving: dict[str, Entry] = {}
        self.ready: dict[str, Entry] = {}
        self.meters = LoadMeters()
        self.loads = self.num_awaited = 0
        self.fetcher = fetcher
        self.loader = Loader(device.arena.buffer)
        self._device = device
        self._host = host
        self._shared = shared
        self._installer = installer
        self._left = left
        self._reads = self._read_bytes = 0

    @property
    def mean_bytes(self) -> int:
        """What an adapter takes on the device, on average of those that came to host memory so far."""
        return self._read_bytes // max(self._reads, 1)

    def start(self, digest: str, path: str) -> Entry:
        """A new entry: it is in host memory, or on its way there."""
        entry = Entry(digest, path, State.COMPILING, asked_at=time.monotonic())
        self.entries[digest] = self.moving[digest] = entry
        packed = self._host.look(digest)
        if packed is not None:
            entry.take(packed)
        else:
            entry.reading = self.loader.submit(self.fetcher.fetch, Path(path), digest)
        return entry

    def await_ready(self, entry: Entry) -> None:
        """A request waits for it."""
        if entry.state is State.READY or entry.awaited:
            return
        entry.awaited = True
        self.num_awaited += entry.state is State.COMPILING
        self.hasten(entry)

    def hasten(self, entry: Entry) -> None:
        """It is read before those that nobody waits for."""
        if entry.reading is not None:
            self.loader.hasten(entry.reading)

    def advance(self, entry: Entry, protected: Collection[str]) -> None:
        """Take up what a thread has done for it. protected: digests that do not leave host memory for it."""
        if entry.reading is not None and entry.reading.done():
            self._read(entry, protected)
        elif entry.copying is not None and entry.copying.done():
            self._copied(entry)
        if entry.working or entry.state is State.FAILED:
            return
        if entry.doomed and entry.references == 0:
            self.drop(entry)
        elif entry.state is State.COPYING:
            self._make_ready(entry)

    def place(self, entry: Entry, protected: Collection[str], *, awaited: bool) -> bool:
        """Start the copy of a packed entry, if the device has or makes room: see DeviceTier.place."""
        found = None if entry.doomed else self._device.place(entry, protected, awaited=awaited)
        if found is None or entry.packed is None:
            return False
        entry.state = State.COPYING
        targets = {found.start: entry.packed.data}
        targets |= {start: entry.packed.shared[key] for key, start in found.new.items()}
        starts = self._shared.starts(entry.shared)
        entry.copying = self.loader.copy(targets, partial(self._installer.prepare, entry, found.start, starts))
        return True

    def drop(self, entry: Entry) -> None:
        """Off the device, and forgotten."""
        self._device.drop(entry)
        self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """Forget an entry that holds nothing of the device."""
        del self.entries[entry.digest]
        self.moving.pop(entry.digest, None)
        self.ready.pop(entry.digest, None)
        self._left(entry.digest)

    def _read(self, entry: Entry, protected: Collection[str]) -> None:
        reading, entry.reading = entry.reading, None
        assert reading is not None
        self.num_awaited -= entry.awaited
        try:
            fetched = reading.result()
        except OneBaseError as error:
            return entry.fail(error)
        except OSError as error:  # the adapter may be as good as any
            return entry.fail(StorageFailed(f"the adapter could not be read: {error.strerror or error}"))
        except (MemoryError, OutOfMemoryError) as error:
            return entry.fail(EngineError(f"there is no memory to load the adapter now: {error}"))
        except Exception as error:  # a hostile file must not end the loop, whatever a library makes of it
            return entry.fail(AdapterRejected(f"the adapter cannot be read: {type(error).__name__}: {error}"))
        return self._take(entry, fetched, protected)

    def _take(self, entry: Entry, fetched: Fetched, protected: Collection[str]) -> None:
        """It is in host memory now; it fails where the device could never hold it."""
        self.meters.add(fetched.step, fetched.seconds)
        needed, most = self._bytes_of(fetched.packed), self._device.arena.limit_bytes
        if needed > most:
            message = f"the adapter takes {needed} bytes, the device budget for adapters is {most}"
            return entry.fail(AdapterTooLarge(message))
        self._reads, self._read_bytes = self._reads + 1, self._read_bytes + needed
        return entry.take(fetched.packed if entry.doomed else self._host.put(fetched.packed, protected))

    def _bytes_of(self, packed: PackedProgram) -> int:
        size = self._device.arena.block_bytes
        return sum(size(part.numel()) for part in (packed.data, *packed.shared.values()))

    def _copied(self, entry: Entry) -> None:
        copying, entry.copying, entry.packed = entry.copying, None, None
        assert copying is not None
        failed = copying.exception()
        self._shared.filled(entry.filling, broken=failed is not None)
        if failed is not None:  # the block holds anything now
            return self._give_up(entry, failed)
        copied = copying.result()
        entry.installable = copied.installable
        return self.meters.add("copy", copied.seconds)

    def _make_ready(self, entry: Entry) -> None:
        if not self._shared.are_filled(entry.shared):
            return None  # another adapter's copy is filling what this one shares
        if self._shared.any_broken(entry.shared):
            return self._give_up(entry, "what it shares with another one could not be copied")
        self._installer.install(entry)
        entry.state = State.READY
        self.ready[entry.digest] = self.moving.pop(entry.digest)
        self.loads += 1
        return self.meters.add("wait", time.monotonic() - entry.asked_at)

    def _give_up(self, entry: Entry, reason: object) -> None:
        self._device.drop(entry)
        entry.fail(EngineError(f"the adapter could not be copied to the device: {reason}"))

    def check(self) -> None:
        """Prove that entries, blocks and shared blocks correspond. Raises RuntimeError where they do not."""
        held = sum(1 for entry in self.entries.values() if entry.block >= 0)
        blocks, on_device = self._device.arena.num_blocks, len(self._device.entries)
        if held != on_device or held + len(self._shared) != blocks:
            raise RuntimeError(
                f"adapters: {held} entries hold blocks, {len(self._shared)} are shared, the arena has {blocks}, the "
                f"device tier {on_device}"
            )
        users = sum(len(entry.shared) for entry in self.entries.values() if entry.block >= 0)
        if users != self._shared.num_references:
            raise RuntimeError(f"adapters: {users} uses of shared blocks, counted {self._shared.num_references}")
        ready = {digest for digest, entry in self.entries.items() if entry.state is State.READY}
        if self.ready.keys() != ready or self.moving.keys() != self.entries.keys() - ready:
            raise RuntimeError("adapters: those that are not ready are not those that move")
        awaited = sum(entry.awaited for entry in self.moving.values() if entry.state is State.COMPILING)
        if awaited != self.num_awaited:
            raise RuntimeError(f"adapters: requests wait for {awaited} reads, counted {self.num_awaited}")
