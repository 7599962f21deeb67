"""Whole parameters in an adapter's file: modules_to_save, trained biases, saved embeddings, heads of classifiers.

Most tuners of PEFT write them beside their own tensors, under the parameter's own name (``base_layer.`` before it where
the tuner wraps the module). They replace the base's; what is compiled is the difference. A module that modules_to_save
names is a copy of its own; any other parameter is loaded into the base's, so that modules tied to it change with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import refused
from onebase.adapters.formats.files import AdapterFiles, TensorBag
from onebase.adapters.formats.heads import take_head
from onebase.adapters.formats.keys import check_shape, group_by_site
from onebase.adapters.formats.register import Compiled
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.dense import Dense, OutputRows
from onebase.kernels.ops.norm import NormOverride
from onebase.kernels.ops.tokens import TokenRows

_WRAPPED = "base_layer."
_SUFFIXES = ("weight", "bias", _WRAPPED + "weight", _WRAPPED + "bias")
_OWN_PARAMETERS = (SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.NORM)
_COMPARED_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Beside:
    """What a family allows at a site that it adapts.

    weight: its operations neither read the base's weight nor act on what it gave. bias: they leave the bias alone.
    """

    weight: bool = False
    bias: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Trained parameters of one module, in the base's dtype on the host; None where the base has the same.

    weight: as the module stores it, but [out_features, in_features] for LINEAR.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None


def with_saved(
    ops: Mapping[str, SiteOps], files: AdapterFiles, base: BaseModel, beside: Beside | None = None
) -> Compiled:
    """A family's operations and those of every whole parameter; the family has taken its own tensors before.

    Takes the fields modules_to_save and bias. Raises AdapterRejected naming the key or field.
    """
    names = files.fields.names("modules_to_save")
    _take_bias_field(files)
    head = take_head(files, base)
    groups = group_by_site(files.tensors, base, _SUFFIXES)
    _check_complete(names, groups, ops, base)
    found = dict(ops)
    for path, keys in groups.items():
        copies = take_copies(base.sites[path], _plain(keys), files.tensors, base)
        if copies.weight is None and copies.bias is None:
            continue
        _check_spelling(path, keys, path in ops)
        if copies.weight is not None and path not in ops:
            _check_named(path, keys, names, base)
        tied = () if _is_named(path, names) else (p for p in base.tied(path) if p not in groups)
        for target in (path, *tied):
            if target in ops:
                _check_beside(target, copies, beside or Beside())
            found[target] = merged(found.get(target, SiteOps()), replaced(base.sites[target], copies, base))
    return Compiled({path: op for path, op in found.items() if any(True for _ in op.tensors())}, head=head)


def take_copies(site: Site, keys: Mapping[str, str], tensors: TensorBag, base: BaseModel) -> Copies:
    """keys: {"weight" or "bias": key}. Raises AdapterRejected where one does not fit the site."""
    weight: Tensor | None = None
    bias: Tensor | None = None
    if site.kind not in _OWN_PARAMETERS:
        key = next(iter(keys.values()))
        raise AdapterRejected(f"{site.path} has no parameters of its own, and {key!r} would be one.", param=key)
    if key := keys.get("weight", ""):
        weight = _take_weight(key, site, tensors, base)
    if key := keys.get("bias", ""):
        bias = _take_bias(key, site, tensors, base)
    return Copies(weight, bias)


def replaced(site: Site, copies: Copies, base: BaseModel) -> SiteOps:
    """The operations that put trained parameters in the place of the base's."""
    if copies.weight is None and copies.bias is None:
        return SiteOps()
    if site.kind is SiteKind.NORM:
        return SiteOps(extra=(_norm(site, copies, base),))
    add_out = None if copies.bias is None else copies.bias.float() - _host(base.bias(site.path)).float()
    if copies.weight is None:
        return SiteOps(add_out=add_out)
    rows = _changed_rows(copies.weight, base.weight(site.path))
    if site.kind is SiteKind.EMBEDDING:
        return SiteOps(extra=(TokenRows(rows.int(), copies.weight[rows] * site.output_scale),))
    return SiteOps(add_out=add_out, extra=(output_rows(site, rows, copies.weight[rows], base),))


def output_rows(site: Site, rows: Tensor, weight: Tensor, base: BaseModel) -> Dense | OutputRows:
    """A linear site whose weight rows ``rows`` (int64, ascending) become ``weight`` [len(rows), in_features]."""
    current = base.weight(site.path)
    difference = torch.empty_like(weight)
    for start in range(0, len(rows), _COMPARED_ROWS):
        at = slice(start, start + _COMPARED_ROWS)
        taken = current[rows[at].to(current.device)].cpu().float()
        difference[at] = (weight[at].float() - taken).to(weight.dtype)
    if len(rows) == site.out_features:
        return Dense(difference)
    return OutputRows(rows.int(), difference, site.out_features)


def merged(first: SiteOps, second: SiteOps) -> SiteOps:
    """Both at one site; the second has nothing but add_out and extra."""
    added = [op.add_out for op in (first, second) if op.add_out is not None]
    add_out = torch.stack(added).sum(0) if added else None
    return replace(first, add_out=add_out, extra=(*first.extra, *second.extra))


def _take_bias_field(files: AdapterFiles) -> None:
    value = files.fields.take("bias")
    if value is not None and value not in ("none", "all") and not (isinstance(value, str) and value.endswith("_only")):
        raise refused(
            "bias", value, "it must be 'none', 'all' or '<family>_only'; the tensors say which biases there are"
        )


def _check_complete(
    names: Collection[str], groups: Mapping[str, Mapping[str, str]], adapted: Collection[str], base: BaseModel
) -> None:
    """Every module that modules_to_save names is there, and whole: the base's own would be another one."""
    for path, site in base.sites.items():
        if site.kind not in _OWN_PARAMETERS or path in adapted or not _is_named(path, names):
            continue
        parts = ("weight",) if base.bias(path) is None else ("weight", "bias")
        for part in parts:
            if not {part, _WRAPPED + part} & groups.get(path, {}).keys():
                message = f"modules_to_save names {path}, and the files have no tensor of its {part}."
                raise AdapterRejected(message, param="files")


def _check_named(path: str, keys: Mapping[str, str], names: Collection[str], base: BaseModel) -> None:
    """PEFT writes the weight of a linear module only where modules_to_save names it, but for the output head's. It may
    be one that target_modules wraps, and then PEFT drops the weight."""
    site = base.sites[path]
    is_head = site.out_features == base.config.get("vocab_size")
    if site.kind is SiteKind.LINEAR and not is_head and not _is_named(path, names):
        message = f"The tensor {keys['weight']!r} is a whole weight, and modules_to_save does not name {path}."
        raise AdapterRejected(message, param="modules_to_save")


def _is_named(path: str, names: Collection[str]) -> bool:
    """As PEFT matches them: by the end of the path, or of a module that holds it."""
    parts = path.split(".")
    return any(".".join(parts[:end]).endswith(name) for name in names for end in range(1, len(parts) + 1))


def _plain(keys: Mapping[str, str]) -> dict[str, str]:
    """{"weight" or "bias": key}. Raises AdapterRejected where two keys mean the same."""
    found: dict[str, str] = {}
    for suffix, key in keys.items():
        name = suffix.removeprefix(_WRAPPED)
        if name in found:
            raise AdapterRejected(f"The tensors {found[name]!r} and {key!r} mean the same.", param=key)
        found[name] = key
    return found


def _check_spelling(path: str, keys: Mapping[str, str], adapted: bool) -> None:
    """PEFT drops a parameter under another name than it has in the adapted model."""
    for suffix, key in keys.items():
        if suffix.startswith(_WRAPPED) is not adapted:
            name = f"{path}.{_WRAPPED if adapted else ''}{suffix.removeprefix(_WRAPPED)}"
            raise AdapterRejected(
                f"The tensor {key!r} would be dropped: in this adapter it is called {name}.", param=key
            )


def _check_beside(path: str, copies: Copies, beside: Beside) -> None:
    if copies.weight is not None and not beside.weight:
        message = f"{path} is adapted, and the file holds another weight for it: this family is served over the base's."
        raise AdapterRejected(message, param=path)
    if copies.bias is not None and not beside.bias:
        message = f"{path} is adapted, and the file holds another bias for it: this family is served over the base's."
        raise AdapterRejected(message, param=path)


def _take_weight(key: str, site: Site, tensors: TensorBag, base: BaseModel) -> Tensor | None:
    weight = base.weight(site.path)
    transposed = weight.dim() == 2 and weight.stride(0) < weight.stride(1)  # Conv1D, which stores [in, out]
    stored = tuple(weight.T.shape if transposed else weight.shape)
    check_shape(key, tensors, stored, "the base's; resized vocabularies are not served")
    copy = tensors.take(key).to(weight.dtype)
    copy = copy.T.contiguous() if transposed else copy
    return copy if len(_changed_rows(copy, weight)) else None


def _take_bias(key: str, site: Site, tensors: TensorBag, base: BaseModel) -> Tensor | None:
    bias = base.bias(site.path)
    if bias is None:
        raise AdapterRejected(f"The tensor {key!r} is a bias, and {site.path} of the base has none.", param=key)
    check_shape(key, tensors, tuple(bias.shape), "the base's")
    copy = tensors.take(key).to(bias.dtype)
    return None if torch.equal(copy, bias.detach().cpu()) else copy


def _changed_rows(copy: Tensor, weight: Tensor) -> Tensor:
    """Indices, int64 on the host, ascending. Some rows at a time: a whole copy has no place in any device's budget."""
    changed = []
    for start in range(0, len(weight), _COMPARED_ROWS):
        rows = weight[start : start + _COMPARED_ROWS].detach().cpu()
        differs = copy[start : start + _COMPARED_ROWS] != rows
        changed.append((differs.flatten(1).any(1) if differs.dim() > 1 else differs).nonzero().flatten() + start)
    return torch.cat(changed)


def _norm(site: Site, copies: Copies, base: BaseModel) -> NormOverride:
    weight = _host(base.weight(site.path)) if copies.weight is None else copies.weight
    bias = base.bias(site.path) if copies.bias is None else copies.bias
    return NormOverride(weight, None if bias is None else _host(bias))


def _host(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("the base has no such parameter")
    return tensor.detach().cpu().clone()
