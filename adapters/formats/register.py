"""The register of families: peft_type -> compiler. A family is one module that registers itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from onebase.adapters.base import BaseModel
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.program import AdapterProgram, SiteOps

Compiler = Callable[[AdapterFiles, BaseModel], Mapping[str, SiteOps]]

_FAMILY = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_compilers: dict[str, Compiler] = {}


def register(peft_type: str) -> Callable[[Compiler], Compiler]:
    """Decorator. The compiler has to take every field and every tensor that it understands; the rest is refused.

    Raises ValueError for a name that is no peft_type, or is taken.
    """
    if not _FAMILY.fullmatch(peft_type):
        raise ValueError(f"{peft_type!r} is no peft_type: capitals, digits and _ are allowed")
    if peft_type in _compilers:
        raise ValueError(f"{peft_type} is registered already")

    def add(compiler: Compiler) -> Compiler:
        _compilers[peft_type] = compiler
        return compiler

    return add


def families() -> tuple[str, ...]:
    """Every registered peft_type, sorted."""
    return tuple(sorted(_compilers))


def compile_folder(path: Path, base: BaseModel, digest: str) -> AdapterProgram:
    """Compile an adapter folder for a base model. ``digest`` names the folder's content.

    Raises AdapterRejected where it cannot be served exactly, AdapterTooLarge over a limit. Tensors of the program are
    on the host, in the file's dtypes.
    """
    files = AdapterFiles(path)
    compiler = _compilers.get(files.family)
    if compiler is None:
        raise AdapterRejected(
            f"peft_type {files.family[:64]!r} is not served; served are {', '.join(families())}.", param="peft_type"
        )
    ops = compiler(files, base)
    files.fields.finish()
    files.tensors.finish()
    if not ops:
        raise AdapterRejected("The adapter has no tensors, so it would change nothing.", param="files")
    return AdapterProgram(digest=digest, family=files.family, ops=ops)
