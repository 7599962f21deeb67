"""PARTIAL: trained parameters of the base itself, whole or single entries. A format of our own: see docs/partial.md.

Covers the methods that train a part of the model and have no format of their own: BitFit (2106.10199), norms only,
FISH Mask (2111.09839), Diff pruning (2012.07463), LT-SFT, Child-Tuning, SAM. ``mode`` says whether the tensors take the
place of the base's values (replace) or are added to them (add). What is compiled is the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.entries import sparse, take_indices
from onebase.adapters.formats.files import AdapterFiles, TensorBag
from onebase.adapters.formats.keys import check_shape, group_by_site
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import merged
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.dense import Dense, OutputRows
from onebase.kernels.ops.instruction import RowInstruction
from onebase.kernels.ops.norm import NormOverride
from onebase.kernels.ops.tokens import TokenRows

WEIGHT, BIAS, INDICES, VALUES = "weight", "bias", ".indices", ".values"
SPARSE_SHARE = 1 / 8  # up to this share of changed entries they are kept one by one

_SUFFIXES = [name + part for name in (WEIGHT, BIAS) for part in ("", INDICES, VALUES)]
_KINDS = (SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.NORM)


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Changed entries of a matrix: rows, columns [n] int64; values [n] float32."""

    rows: Tensor
    columns: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What is added to a module's parameters: weight [out, in] (NORM: [width]) or entries of it; bias [out]."""

    weight: Tensor | Entries | None
    bias: Tensor | None


@register(
    "PARTIAL",
    title="Partial fine-tuning",
    paper="2106.10199",
    covers=("BitFit", "U-BitFit", "S-BitFit", "FISH Mask", "LT-SFT", "Child-Tuning", "Diff Pruning", "SAM"),
    instructions=("AddOut", "NormOverride", "Sparse", "Dense", "OutputRows", "TokenRows"),
    cost="biases: h; n entries: 2n FLOPs; a whole weight: 2h^2",
    note="a format of our own, written in five lines by any training loop: docs/partial.md",
)
def compile_partial(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    mode = files.fields.choice("mode", ("replace", "add"), None, "it must be 'replace' or 'add'")
    groups = group_by_site(files.tensors, base, _SUFFIXES)
    ops: dict[str, SiteOps] = {}
    for path, keys in groups.items():
        changes = _read(base.sites[path], keys, files.tensors, base, adds=mode == "add")
        tied = [other for other in base.tied(path) if other not in groups] if changes.weight is not None else []
        for target in (path, *tied):
            site = base.sites[target]
            new = _ops(site, changes if target == path else Changes(changes.weight, None), base)
            ops[target] = merged(ops.get(target, SiteOps()), new)
    return Compiled({path: op for path, op in ops.items() if any(True for _ in op.tensors())})


def _read(site: Site, keys: Mapping[str, str], tensors: TensorBag, base: BaseModel, *, adds: bool) -> Changes:
    if site.kind not in _KINDS:
        key = next(iter(keys.values()))
        raise AdapterRejected(f"{site.path} has no parameters of its own, and {key!r} would be one.", param=key)
    weight = bias = None
    if any(suffix.startswith(WEIGHT) for suffix in keys):
        weight = _read_weight(site, keys, tensors, base.weight(site.path), adds)
    if any(suffix.startswith(BIAS) for suffix in keys):
        old = base.bias(site.path)
        if old is None:
            key = next(key for suffix, key in keys.items() if suffix.startswith(BIAS))
            raise AdapterRejected(f"The tensor {key!r} is a bias, and {site.path} of the base has none.", param=key)
        bias = _read_vector(keys, BIAS, tensors, old, adds)
    return Changes(weight, bias)


def _read_weight(
    site: Site, keys: Mapping[str, str], tensors: TensorBag, old: Tensor, adds: bool
) -> Tensor | Entries | None:
    """None where nothing changes."""
    if old.dim() == 1:
        return _read_vector(keys, WEIGHT, tensors, old, adds)
    transposed = old.stride(0) < old.stride(1)  # Conv1D, which stores [in, out]
    stored = old.T if transposed else old
    if _is_whole(keys, WEIGHT):
        change = _whole(keys[WEIGHT], tensors, stored, adds)
        return _thinned(change.T.contiguous() if transposed else change)
    flat, values = _entries(keys, WEIGHT, tensors, stored.numel())
    if not len(flat):
        return None
    rows, columns = flat // stored.shape[1], flat % stored.shape[1]
    if not adds:
        values = values - stored[rows.to(stored.device), columns.to(stored.device)].float().cpu()
    return Entries(columns, rows, values) if transposed else Entries(rows, columns, values)


def _read_vector(keys: Mapping[str, str], name: str, tensors: TensorBag, old: Tensor, adds: bool) -> Tensor:
    """The change of a bias or of a norm's weight, [width] float32."""
    if _is_whole(keys, name):
        return _whole(keys[name], tensors, old, adds)
    places, values = _entries(keys, name, tensors, old.numel())
    host = old.detach().float().cpu()
    change = torch.zeros_like(host)
    change[places] = values if adds else values - host[places]
    return change


def _is_whole(keys: Mapping[str, str], name: str) -> bool:
    """Raises AdapterRejected where a parameter is there in both forms, or a half of one."""
    present = [keys[name + part] for part in ("", INDICES, VALUES) if name + part in keys]
    if name in keys and len(present) == 1:
        return True
    if name not in keys and len(present) == 2:
        return False
    raise AdapterRejected(
        f"The tensor {present[0]!r}: a parameter is given whole, or by {name}{INDICES} and {name}{VALUES}; not half, "
        "and not in both ways.",
        param=present[0],
    )


def _whole(key: str, tensors: TensorBag, old: Tensor, adds: bool) -> Tensor:
    check_shape(key, tensors, tuple(old.shape), "the base's")
    new = tensors.take(key).float()
    return new if adds else new - old.detach().float().cpu()


def _entries(keys: Mapping[str, str], name: str, tensors: TensorBag, size: int) -> tuple[Tensor, Tensor]:
    """Places in the flattened parameter, int64, distinct; and their values, float32."""
    key, values_key = keys[name + INDICES], keys[name + VALUES]
    shape = tensors.shape(values_key)
    if len(shape) != 1:
        raise AdapterRejected(f"The tensor {values_key!r} has shape {shape}; it must have one dimension.", param=key)
    places = take_indices(key, tensors, shape, (size,), "one for each value")
    if not bool(places.sort().values.diff().all()):
        raise AdapterRejected(f"The tensor {key!r} names a place twice.", param=key)
    return places, tensors.take(values_key).float()


def _thinned(change: Tensor) -> Tensor | Entries | None:
    """The same, in the form that is smaller."""
    count = int(change.count_nonzero())
    if count > SPARSE_SHARE * change.numel():
        return change
    rows, columns = change.nonzero(as_tuple=True)
    return Entries(rows, columns, change[rows, columns]) if count else None


def _ops(site: Site, changes: Changes, base: BaseModel) -> SiteOps:
    if site.kind is SiteKind.NORM:
        return SiteOps(extra=(_norm(site, changes, base),))
    if site.kind is SiteKind.EMBEDDING:
        return SiteOps(extra=() if changes.weight is None else (_token_rows(site, changes.weight, base),))
    return SiteOps(add_out=changes.bias, extra=() if changes.weight is None else (_linear(site, changes.weight),))


def _norm(site: Site, changes: Changes, base: BaseModel) -> NormOverride:
    assert not isinstance(changes.weight, Entries)
    weight = base.weight(site.path).detach().float().cpu()
    bias = base.bias(site.path)
    host = None if bias is None else bias.detach().float().cpu()
    return NormOverride(
        weight if changes.weight is None else weight + changes.weight,
        host if changes.bias is None or host is None else host + changes.bias,
    )


def _token_rows(site: Site, change: Tensor | Entries, base: BaseModel) -> TokenRows:
    rows, difference = _changed_rows(change, site.out_features)
    old = base.weight(site.path)
    new = old[rows.to(old.device)].detach().float().cpu() + difference
    return TokenRows(rows.int(), new * site.output_scale)


def _linear(site: Site, change: Tensor | Entries) -> RowInstruction:
    if isinstance(change, Entries):
        return sparse(site, change.rows, change.columns, change.values)
    rows, difference = _changed_rows(change, site.in_features)
    if len(rows) == site.out_features:
        return Dense(change)
    return OutputRows(rows.int(), difference, site.out_features)


def _changed_rows(change: Tensor | Entries, width: int) -> tuple[Tensor, Tensor]:
    """Indices of the rows that change, int64, ascending; and by how much, [rows, width] float32."""
    if isinstance(change, Entries):
        touched = torch.bincount(change.rows)
        rows, at = touched.nonzero().flatten(), (touched > 0).cumsum(0)[change.rows] - 1
        difference = torch.zeros(len(rows), width)
        difference[at, change.columns] = change.values
        return rows, difference
    rows = change.any(1).nonzero().flatten()
    return rows, change[rows]
