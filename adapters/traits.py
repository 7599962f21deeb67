"""What the engine has to know of a compiled adapter after its program is gone: how it sits in a sequence, and with whom
it may share a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onebase.adapters.program import AdapterProgram, SiteOps, Window
from onebase.kernels.ops.instruction import Phase, RowInstruction
from onebase.kernels.ops.prefix import KvPrefix


@dataclass(frozen=True, slots=True)
class Traits:
    """See AdapterProgram for the first three.

    unscalable: sites where only the scales 0 and 1 mean something. inputs, maps: linear sites where it changes what the
    base reads, and where it reads what the base gave. stores_prefix: its virtual tokens are stored keys and values,
    which nobody has to compute. classifies: it has a classification head; per_token: one that speaks of every token.
    window: see AdapterProgram.
    """

    num_virtual_tokens: int = 0
    first_position: int = 0
    invocation: tuple[int, ...] = ()
    unscalable: frozenset[str] = frozenset()
    inputs: frozenset[str] = frozenset()
    maps: frozenset[str] = frozenset()
    stores_prefix: bool = False
    classifies: bool = False
    per_token: bool = False
    window: Window | None = None

    @classmethod
    def of(cls, program: AdapterProgram) -> Traits:
        ops = program.ops
        return cls(
            num_virtual_tokens=program.num_virtual_tokens,
            first_position=program.first_position,
            invocation=program.invocation,
            unscalable=frozenset(path for path, op in ops.items() if not op.scalable),
            inputs=frozenset(path for path, op in ops.items() if _has(op, Phase.INPUT)),
            maps=frozenset(path for path, op in ops.items() if _has(op, Phase.MAP)),
            classifies=program.head is not None,
            per_token=program.head is not None and program.head.per_token,
            stores_prefix=any(isinstance(item, KvPrefix) for op in ops.values() for item in op.extra),
            window=program.window,
        )


def why_not(uses: Sequence[tuple[Traits, float]]) -> tuple[tuple[int, ...], str] | None:
    """Why adapters with their scales cannot be on one request: (positions of the one or two at fault, reason), or None
    where they can. A scale of 0 takes no part."""
    active = [(at, traits, scale) for at, (traits, scale) in enumerate(uses) if scale != 0]
    for at, traits, scale in active:
        if scale != 1 and traits.unscalable:
            return (
                at,
            ), f"only the scales 0 and 1 mean something for it: {_some(traits.unscalable)} is not linear in it"
    for place, (at, one, _) in enumerate(active):
        for other_at, other, _ in active[place + 1 :]:
            if reason := _clash(one, other):
                return (at, other_at), reason
    return None


def _clash(one: Traits, other: Traits) -> str | None:
    if one.num_virtual_tokens and other.num_virtual_tokens:
        return "both put virtual tokens before the prompt"
    if one.invocation and other.invocation and one.invocation != other.invocation:
        return "each is activated by tokens of its own"
    if both := one.unscalable & other.unscalable:
        return f"what they do at {_some(both)} does not add up"
    if both := (one.inputs & other.maps) | (other.inputs & one.maps):
        return f"at {_some(both)} one changes what the base reads and the other maps what it gives"
    return None


def _some(paths: frozenset[str]) -> str:
    return min(paths)


def _has(op: SiteOps, phase: Phase) -> bool:
    return any(isinstance(item, RowInstruction) and type(item).phase is phase for item in op.extra)
