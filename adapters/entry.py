"""One adapter on its way to, or on, the device."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum

from onebase.adapters.errors import AdapterError
from onebase.adapters.packing import PackedHead, PackedInstruction, PackedProgram
from onebase.adapters.program import Head
from onebase.adapters.traits import Traits
from onebase.kernels.tables import Operands


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
    work: Future[PackedProgram] | Future[None] | None = None
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
    handle: int = -1
    tail: int = -1
    references: int = 0
    last_used: int = 0
    doomed: bool = False  # unload was asked for: dropped when the last reference goes
    error: AdapterError | None = None
