"""A packed program without its tensors as plain JSON values, and back.

Instructions are named by class, out of a closed register, and built from plain fields: nothing is looked up or run that
the file names. What does not fit the classes of this version is no longer readable, which costs a compilation.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from onebase.adapters.packing import PackedHead, PackedInstruction, PackedProgram, Slot
from onebase.adapters.program import Window
from onebase.adapters.traits import Traits
from onebase.kernels import ops
from onebase.kernels.ops.instruction import Instruction
from onebase.kernels.tables import Operands

_SETS = ("unscalable", "inputs", "maps")  # fields of Traits that JSON has as sorted lists
_EMPTY = torch.empty(0)
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


class Unreadable(Exception):
    """A compiled form that this version cannot read. Never leaves the reader of the tier: it is compiled again."""


def to_plain(packed: PackedProgram) -> dict[str, Any]:
    """Everything but the tensors."""
    return {
        "digest": packed.digest,
        "family": packed.family,
        "rank": packed.rank,
        "sites": packed.sites,
        "traits": _traits_to_plain(packed.traits),
        "operands": {path: [o.rank, o.scale, o.a, o.b, o.add_out, o.token] for path, o in packed.operands.items()},
        "extra": {path: [_instruction_to_plain(one) for one in items] for path, items in packed.extra.items()},
        "head": None if packed.head is None else _head_to_plain(packed.head),
    }


def from_plain(plain: Mapping[str, Any], data: Tensor, shared: Mapping[str, Tensor]) -> PackedProgram:
    """The program over its tensors. Raises Unreadable for anything that ``to_plain`` of this version does not make."""
    try:
        packed = PackedProgram(
            digest=plain["digest"],
            family=plain["family"],
            rank=plain["rank"],
            sites=plain["sites"],
            traits=_traits(plain["traits"]),
            data=data,
            operands={path: _operands(fields) for path, fields in plain["operands"].items()},
            extra={path: tuple(map(_instruction, items)) for path, items in plain["extra"].items()},
            shared=shared,
            head=None if plain["head"] is None else _head(plain["head"]),
        )
        packed.check()
        return packed
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def _traits_to_plain(traits: Traits) -> dict[str, Any]:
    plain = asdict(traits)
    return plain | {name: sorted(plain[name]) for name in _SETS}


def _traits(plain: Mapping[str, Any]) -> Traits:
    window = plain["window"]
    return Traits(
        **dict(plain)
        | {name: frozenset(plain[name]) for name in _SETS}
        | {"invocation": tuple(plain["invocation"]), "window": None if window is None else Window(**window)}
    )


def _operands(plain: list[Any]) -> Operands:
    """What ``pack`` lays out; vectors lie in slots."""
    rank, scale, a, b, add_out, token = plain
    return Operands(rank, scale, a, b, add_out, token)


def _slot_to_plain(slot: Slot) -> list[Any]:
    return [slot.start, list(slot.shape), str(slot.dtype).removeprefix("torch."), slot.shared]


def _slot(plain: list[Any]) -> Slot:
    start, shape, dtype, shared = plain
    return Slot(start, tuple(shape), _DTYPES[dtype], shared)


def _head_to_plain(head: PackedHead) -> list[Any]:
    bias = None if head.bias is None else _slot_to_plain(head.bias)
    return [_slot_to_plain(head.weight), bias, head.per_token]


def _head(plain: list[Any]) -> PackedHead:
    weight, bias, per_token = plain
    return PackedHead(_slot(weight), None if bias is None else _slot(bias), per_token)


def _instruction_to_plain(packed: PackedInstruction) -> list[Any]:
    one = packed.instruction
    plain = {item.name: getattr(one, item.name) for item in fields(one) if item.name not in packed.slots}
    return [type(one).__name__, plain, {name: _slot_to_plain(slot) for name, slot in packed.slots.items()}]


def _instruction(plain: list[Any]) -> PackedInstruction:
    name, values, slots = plain
    kind = INSTRUCTIONS[name]
    if sorted([*values, *slots]) != sorted(item.name for item in fields(kind)):
        raise ValueError(f"{name} has other fields")
    given = {key: _frozen(value) for key, value in values.items()} | dict.fromkeys(slots, _EMPTY)
    return PackedInstruction(kind(**given), {key: _slot(slot) for key, slot in slots.items()})


def _frozen(value: Any) -> Any:
    """JSON has no tuples; plain fields of instructions have no lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _all_instructions() -> Iterator[tuple[str, type[Instruction]]]:
    """Every class of instructions that kernels/ops/ defines, by its name."""
    for module in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, type) and issubclass(value, Instruction) and value.__module__ == module.name:
                yield name, value


INSTRUCTIONS: Mapping[str, type[Instruction]] = dict(_all_instructions())
