"""From tensor keys to sites of the base model.

PEFT writes ``base_model.model.<module path>.<suffix>``. Also read: no prefix, ``base_model.``, the adapter's name left
in (``lora_A.default.weight``), and ``_orig_mod`` parts of compiled models.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.files import TensorBag

_PREFIXES = ("base_model.model.", "base_model.", "")
_ADAPTER_NAME = "default"
_WRAPPERS = frozenset({"_orig_mod"})
_COMPARED_ROWS = 4096


def group_by_site(tensors: TensorBag, base: BaseModel, suffixes: Collection[str]) -> dict[str, dict[str, str]]:
    """Site path -> {suffix: key}. Nothing is taken, and keys with none of the suffixes are left for others.

    Raises AdapterRejected where a key names no site of the base, or two keys mean the same.
    """
    forms = _spellings(suffixes)
    groups: dict[str, dict[str, str]] = {}
    for key in tensors:
        found = _split(key, forms)
        if found is None:
            continue
        module, suffix = found
        group = groups.setdefault(find_site(key, module, base).path, {})
        if suffix in group:
            raise AdapterRejected(f"The tensors {group[suffix]!r} and {key!r} mean the same.", param=key)
        group[suffix] = key
    return groups


def find_site(key: str, module: str, base: BaseModel) -> Site:
    """The site that a key's module part names. Raises AdapterRejected with the base's reason if it has one."""
    paths = [module.removeprefix(prefix) for prefix in _PREFIXES if module.startswith(prefix)]
    for path in paths:
        if path in base.sites:
            return base.sites[path]
    for path in paths:
        if reason := _reason(path, base):
            raise AdapterRejected(f"The tensor {key!r} adapts {path}, which cannot be adapted: {reason}", param=key)
    raise AdapterRejected(f"The tensor {key!r} adapts {paths[0]!r}, and the base has no such module.", param=key)


def check_shape(key: str, tensors: TensorBag, expected: tuple[int, ...], meaning: str) -> None:
    """Raises AdapterRejected unless the tensor has the shape; ``meaning`` says where it comes from."""
    shape = tensors.shape(key)
    if shape != expected:
        raise AdapterRejected(f"The tensor {key!r} has shape {shape}; it must be {expected} ({meaning}).", param=key)


def take_base_copy(key: str, tensors: TensorBag, base: BaseModel, path: str) -> None:
    """PEFT saves a targeted embedding whole. Accept the copy only if it is what the base holds.

    Raises AdapterRejected where it differs: it was trained or resized.
    """
    weight = base.weight(path)
    check_shape(key, tensors, tuple(weight.shape), "the base's; resized vocabularies are not served yet")
    if not _same(tensors.take(key), weight):
        raise AdapterRejected(
            f"The tensor {key!r} differs from the base's weight: trained full weights are not served yet.", param=key
        )


def _same(copy: torch.Tensor, weight: torch.Tensor) -> bool:
    """Compared in the weight's type on its device, some rows at a time: a whole copy has no place in any budget."""
    for start in range(0, len(weight), _COMPARED_ROWS):
        base = weight[start : start + _COMPARED_ROWS]
        rows = copy[start : start + _COMPARED_ROWS].to(device=base.device, dtype=base.dtype)
        if not torch.equal(rows, base):
            return False
    return True


def _spellings(suffixes: Collection[str]) -> list[tuple[str, str]]:
    """(".<as written>", suffix), longest first: ``lora_A.weight`` is also written ``lora_A.default.weight``."""
    forms: list[tuple[str, str]] = []
    for suffix in suffixes:
        head, dot, tail = suffix.partition(".")
        forms += [(f".{suffix}", suffix), (f".{head}.{_ADAPTER_NAME}{dot}{tail}", suffix)]
    return sorted(forms, key=lambda form: -len(form[0]))


def _split(key: str, forms: list[tuple[str, str]]) -> tuple[str, str] | None:
    plain = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    for form, suffix in forms:
        if plain.endswith(form):
            return plain.removesuffix(form), suffix
    return None


def _reason(path: str, base: BaseModel) -> str | None:
    """The base's reason for refusing this module or one that holds it."""
    while path:
        if path in base.refused:
            return base.refused[path]
        path = path.rpartition(".")[0]
    return None
