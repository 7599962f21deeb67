"""One adapter on its way to, or on, the device."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from onebase.adapters.errors import OneBaseError
from onebase.adapters.packing import PackedHead, PackedInstruction, PackedProgram
from onebase.adapters.program import Head
from onebase.adapters.tiers.fetching import Fetched
from onebase.adapters.traits import Traits
from onebase.kernels.tables import Operands

if TYPE_CHECKING:
    from onebase.adapters.tiers.installer import Installable


class State(StrEnum):
    COMPILING = "compiling"
    PLACING = "placing"
    COPYING = "copying"
    READY = "ready"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Entry:
    """One adapter on its way to, or on, the device.

    handle: of its program in the tables. tail: of what it does on the last tokens of its window; the same where it has
    none.
    """

    digest: str
    path: str
    state: State
    asked_at: float = 0.0  # on the monotonic clock
    wants_room: bool = False  # on the device; otherwise host memory will do for now
    awaited: bool = False  # requests came before it was ready
    reading: Future[Fetched] | None = None
    copying: Future[Copied] | None = None
    packed: PackedProgram | None = None  # dropped once copied
    operands: Mapping[str, Operands] = field(default_factory=dict)  # relative to the block
    extra: Mapping[str, tuple[PackedInstruction, ...]] = field(default_factory=dict)
    packed_head: PackedHead | None = None
    head: Head | None = None  # over views of the arena, while it is ready
    shared: Mapping[str, int] = field(default_factory=dict)  # key of a shared block that it reads -> elements
    traits: Traits = field(default_factory=Traits)
    num_elements: int = 0
    family: str = ""
    rank: int = 0
    nbytes: int = 0
    sites: int = 0
    block: int = -1
    filling: tuple[str, ...] = ()  # shared blocks that its copy fills
    installable: Installable | None = None  # made beside its copy
    handle: int = -1
    tail: int = -1
    references: int = 0
    doomed: bool = False  # unload was asked for: it leaves as soon as nobody references it, and serves until then
    error: OneBaseError | None = None

    def take(self, packed: PackedProgram) -> None:
        """It is in host memory: what it is, is known from now on."""
        self.packed, self.state = packed, State.PLACING
        self.operands, self.extra, self.packed_head = packed.operands, packed.extra, packed.head
        self.num_elements = packed.data.numel()
        self.shared = {key: part.numel() for key, part in packed.shared.items()}
        self.traits, self.family, self.rank = packed.traits, packed.family, packed.rank
        self.nbytes, self.sites = packed.nbytes, packed.sites

    def fail(self, error: OneBaseError) -> None:
        self.state, self.error, self.reading, self.copying = State.FAILED, error, None, None

    @property
    def working(self) -> bool:
        """Whether a thread is at work for it."""
        return self.reading is not None or self.copying is not None


@dataclass(frozen=True, slots=True, eq=False)
class Copied:
    """A copy to the device is done: seconds it took, and what the tables take now."""

    seconds: float
    installable: Installable
