"""The register of families: peft_type -> compiler. A family is one module that registers itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onebase.adapters.base import BaseModel, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.refusals import REFUSED_FAMILIES
from onebase.adapters.program import SITE_INSTRUCTIONS, AdapterProgram, Head, SiteOps, Window


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """What a compiler returns. The fields are AdapterProgram's."""

    ops: Mapping[str, SiteOps]
    num_virtual_tokens: int = 0
    first_position: int = 0
    invocation: tuple[int, ...] = ()
    head: Head | None = None
    window: Window | None = None


Compiler = Callable[[AdapterFiles, BaseModel], Compiled]


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A served family, as docs/adapters.md shows it.

    peft_type: as the config has it. title, paper (arXiv number): of the method. covers: the names by which the surveys
    know what it serves. instructions: what it compiles to. cost: extra work for one token at one linear of width h.
    note: options, limits, whether something is computed at load.
    """

    peft_type: str
    compile: Compiler
    title: str
    paper: str
    covers: tuple[str, ...]
    instructions: tuple[str, ...]
    cost: str
    note: str = ""


_FAMILY = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_families: dict[str, Family] = {}


def register(
    peft_type: str,
    *,
    title: str,
    paper: str,
    instructions: tuple[str, ...],
    cost: str,
    covers: tuple[str, ...] = (),
    note: str = "",
) -> Callable[[Compiler], Compiler]:
    """Decorator; see Family. The compiler has to take every field and every tensor that it understands; the rest is
    refused.

    Raises ValueError for a name that is no peft_type, or is taken.
    """
    if not _FAMILY.fullmatch(peft_type):
        raise ValueError(f"{peft_type!r} is no peft_type: capitals, digits and _ are allowed")
    if peft_type in _families or peft_type in REFUSED_FAMILIES:
        raise ValueError(f"{peft_type} is registered already, or refused by name")

    def add(compiler: Compiler) -> Compiler:
        _families[peft_type] = Family(peft_type, compiler, title, paper, covers, instructions, cost, note)
        return compiler

    return add


def families() -> tuple[Family, ...]:
    """Every registered family, in the order of their peft_types."""
    return tuple(_families[name] for name in sorted(_families))


def compile_folder(path: Path, base: BaseModel, digest: str) -> AdapterProgram:
    """Compile an adapter folder for a base model. ``digest`` names the folder's content.

    Raises AdapterRejected where it cannot be served exactly, AdapterTooLarge over a limit. Tensors of the program are
    on the host.
    """
    files = AdapterFiles(path)
    family = _families.get(files.family)
    if family is None:
        raise _unknown(files.family)
    compiled = family.compile(files, base)
    files.fields.finish()
    files.tensors.finish()
    if not compiled.ops and compiled.head is None:
        raise AdapterRejected("The adapter has no tensors, so it would change nothing.", param="files")
    for site, ops in compiled.ops.items():
        _check_place(site, ops, base)
    return AdapterProgram(
        digest=digest,
        family=files.family,
        ops=compiled.ops,
        num_virtual_tokens=compiled.num_virtual_tokens,
        first_position=compiled.first_position,
        invocation=compiled.invocation,
        head=compiled.head,
        window=compiled.window,
    )


def _unknown(name: str) -> AdapterRejected:
    refusal = REFUSED_FAMILIES.get(name)
    if refusal is None:
        message = f"peft_type {name[:64]!r} is not served; served are {', '.join(sorted(_families))}."
    else:
        message = f"{refusal.title} (peft_type {name!r}) is not served. {refusal.reason} {refusal.way_out}"
    return AdapterRejected(message, param="peft_type")


def _check_place(path: str, ops: SiteOps, base: BaseModel) -> None:
    """Every operation stands where it can run."""
    kind = base.sites[path].kind
    fits = all(isinstance(op, SITE_INSTRUCTIONS[kind]) for op in ops.extra)
    if (ops.low_rank or ops.add_out is not None) and kind is not SiteKind.LINEAR:
        fits = fits and ops.low_rank is None and kind is SiteKind.EMBEDDING
    if ops.token_low_rank is not None and kind is not SiteKind.EMBEDDING:
        fits = False
    if not fits:
        raise AdapterRejected(f"{path} is a {kind} of the base: the adapter's tensors do not fit one.", param=path)
