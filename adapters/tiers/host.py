"""Packed adapters in host memory, page-locked where there is a GPU: what leaves the device is a copy away.

The tier has a budget of bytes. What several adapters share is held once, by content. Who is evicted is the policy's
choice among those that nobody protects.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from torch import Tensor

from onebase.adapters.packing import PackedProgram
from onebase.adapters.tiers.policy import Lrfu

_RECORD_BYTES = 256  # of Python objects for one operand or slot, about


@dataclass(slots=True, eq=False)
class _Shared:
    tensor: Tensor
    users: int = 0


class HostTier:
    """Used by the engine's thread. hits, misses: of ``look``."""

    def __init__(self, capacity: int, policy: Lrfu, evicted: Callable[[str], None]) -> None:
        """capacity: bytes; 0 holds nothing. evicted: told of each program that had to go."""
        self.capacity = capacity
        self.used = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self._policy = policy
        self._evicted = evicted
        self._programs: dict[str, PackedProgram] = {}
        self._own: dict[str, int] = {}  # bytes of each, without what it shares
        self._own_bytes = 0  # of all
        self._shared: dict[str, _Shared] = {}
        self._added: set[str] = set()
        self._removed: set[str] = set()

    def __len__(self) -> int:
        return len(self._programs)

    def __contains__(self, digest: str) -> bool:
        return digest in self._programs

    def get(self, digest: str) -> PackedProgram | None:
        return self._programs.get(digest)

    def look(self, digest: str) -> PackedProgram | None:
        """As ``get``, for somebody who would have to load it otherwise."""
        found = self._programs.get(digest)
        self.hits += found is not None
        self.misses += found is None
        return found

    def put(self, packed: PackedProgram, protected: Collection[str]) -> PackedProgram:
        """Keep a program, at the cost of colder ones that are not protected, if that makes enough room.

        Returns the program to go on with: what it shares with others here is theirs.
        """
        digest = packed.digest
        if digest in self._programs or not self._make_room(packed, protected):
            return self._programs.get(digest, packed)
        shared = {key: self._share(key, flat) for key, flat in packed.shared.items()}
        self._programs[digest] = packed = replace(packed, shared=shared)
        self._own[digest] = own = _own_bytes(packed)
        self._own_bytes += own
        self.used += own
        self._removed.discard(digest)
        self._added.add(digest)
        return packed

    def drop(self, digest: str) -> None:
        """Let go of a program, if it is here."""
        packed = self._programs.pop(digest, None)
        if packed is None:
            return
        own = self._own.pop(digest)
        self._own_bytes -= own
        self.used -= own
        for key in packed.shared:
            self._shared[key].users -= 1
            if self._shared[key].users == 0:
                self.used -= held_bytes(self._shared.pop(key).tensor)
        self._added.discard(digest)
        self._removed.add(digest)

    def changes(self) -> tuple[set[str], set[str]]:
        """Digests that came, and that went, since this was asked last."""
        changes = self._added, self._removed
        self._added, self._removed = set(), set()
        return changes

    def _make_room(self, packed: PackedProgram, protected: Collection[str]) -> bool:
        """Evict nobody unless it helps: the sum of what may go is looked at first."""
        may_go = self._own_bytes - sum(self._own.get(digest, 0) for digest in set(protected))
        if self.used - may_go + self._needed(packed) > self.capacity:
            return False
        if not self._lacks(packed):
            return True
        kept = set(protected)
        for coldest in self._policy.coldest_first(digest for digest in self._programs if digest not in kept):
            self.drop(coldest)
            self.evictions += 1
            self._evicted(coldest)
            if not self._lacks(packed):
                return True
        return False

    def _lacks(self, packed: PackedProgram) -> bool:
        return self.used + self._needed(packed) > self.capacity

    def _needed(self, packed: PackedProgram) -> int:
        new = (flat for key, flat in packed.shared.items() if key not in self._shared)
        return _own_bytes(packed) + sum(map(held_bytes, new))

    def _share(self, key: str, flat: Tensor) -> Tensor:
        known = self._shared.get(key)
        if known is None:
            known = self._shared[key] = _Shared(flat)
            self.used += held_bytes(flat)
        known.users += 1
        return known.tensor

    def check(self) -> None:
        """Prove the book of bytes and of users. Raises RuntimeError where it is wrong."""
        own = sum(map(_own_bytes, self._programs.values()))
        if own != self._own_bytes or self._own.keys() != self._programs.keys():
            raise RuntimeError(f"host: programs take {own} bytes, {self._own_bytes} counted")
        shared = sum(held_bytes(one.tensor) for one in self._shared.values())
        if own + shared != self.used or self.used > self.capacity:
            raise RuntimeError(f"host: {own} + {shared} bytes held, {self.used} counted, {self.capacity} allowed")
        users = sum(len(packed.shared) for packed in self._programs.values())
        if users != sum(one.users for one in self._shared.values()) or any(o.users < 1 for o in self._shared.values()):
            raise RuntimeError(f"host: {users} uses of shared tensors, not as counted")


def held_bytes(tensor: Tensor) -> int:
    """What a tensor takes: torch hands page-locked memory out in powers of two."""
    nbytes = tensor.numel() * tensor.element_size()
    return 1 << (nbytes - 1).bit_length() if nbytes and tensor.is_pinned() else nbytes


def _own_bytes(packed: PackedProgram) -> int:
    records = len(packed.operands) + sum(len(one.slots) for items in packed.extra.values() for one in items)
    return held_bytes(packed.data) + _RECORD_BYTES * records
