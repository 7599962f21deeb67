"""PEFT's MISS and its predecessor BONE. Kang and Yin, "MiSS" (2409.15371).

The input is folded into groups of r features, summed, and multiplied by one block: ``y += (sum of x's groups) block``,
a low rank whose first factor is a tiled identity. ``init_weights`` names the variant:

    true, false   block [r, out]
    "mini"        block [r, mini_r], repeated over the outputs
    "bat"         block [out / r, r, r]; tile (o, i) of W changes by W_oi block_o + block_o: full rank, needs W

BONE has the first and the last under its own names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.derived import base_weight
from onebase.adapters.formats.fields import MAX_RANK
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps

_NOTE = "init_weights 'bat' needs the base's weight at load and is dense"


@dataclass(frozen=True, slots=True)
class _Variant:
    """name: of the family's tensor. kind: "", "mini" or "bat"."""

    name: str
    kind: str
    r: int
    mini_r: int = 1


@register(
    "MISS",
    title="MiSS",
    paper="2409.15371",
    instructions=("LowRank", "Dense"),
    cost="4hr FLOPs, 2hr elements; 'bat': 2h^2, h^2",
    note=_NOTE + "; 'mini' is served too",
)
def compile_miss(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    kind = files.fields.choice("init_weights", (True, False, "bat", "mini"), True, "true, false, 'bat', 'mini' exist")
    mini_r = files.fields.integer("mini_r", 1, 1 << 20, default=1)
    r = files.fields.integer("r", 1, MAX_RANK)
    return _compile(files, base, _Variant("miss", str(kind) if isinstance(kind, str) else "", r, mini_r))


@register(
    "BONE",
    title="Bone",
    paper="2409.15371",
    instructions=("LowRank", "Dense"),
    cost="4hr FLOPs, 2hr elements; 'bat': 2h^2, h^2",
    note=_NOTE + "; today's PEFT reads such files only after a conversion to MISS",
)
def compile_bone(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    kind = files.fields.choice("init_weights", (True, False, "bat"), True, "true, false and 'bat' exist")
    r = files.fields.integer("r", 1, MAX_RANK)
    return _compile(files, base, _Variant("bone", str(kind) if isinstance(kind, str) else "", r))


def _compile(files: AdapterFiles, base: BaseModel, variant: _Variant) -> Compiled:
    ignore_training(files.fields, f"{variant.name}_dropout")
    reducer = Reducer()
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, (f"{variant.name}_block",)):
        site, block = tensors.site, _take(tensors, variant)
        ops[site.path] = _bat(site, block, base, reducer) if variant.kind == "bat" else _folded(site, block, reducer)
    return with_saved(ops, files, base, Beside(weight=variant.kind != "bat"))


def _take(tensors: SiteTensors, variant: _Variant) -> Tensor:
    site, r, name = tensors.site, variant.r, f"{variant.name}_block"
    if r > site.in_features:
        raise AdapterRejected(f"r is {r}, and {site.path} has {site.in_features} inputs.", param="r")
    if variant.kind == "bat":
        if site.in_features % r or site.out_features % r:
            raise AdapterRejected(f"r is {r}; for 'bat' it must divide both widths of {site.path}.", param="r")
        return tensors.take(name, (site.out_features // r, r, r), "blocks of r by r over the outputs")
    if variant.kind == "mini":
        if site.out_features % variant.mini_r:
            raise AdapterRejected(f"mini_r must divide the {site.out_features} outputs of {site.path}.", param="mini_r")
        return tensors.take(name, (r, variant.mini_r), "r and mini_r")
    return tensors.take(name, (r, site.out_features), "r and out_features")


def _folded(site: Site, block: Tensor, reducer: Reducer) -> SiteOps:
    r = len(block)
    fold = torch.eye(r).repeat(1, -(-site.in_features // r))[:, : site.in_features]
    return reducer.product(site, fold, block.repeat(1, site.out_features // block.shape[1]))


def _bat(site: Site, block: Tensor, base: BaseModel, reducer: Reducer) -> SiteOps:
    reducer.spend(site.path, site.in_features * site.out_features)
    r = block.shape[-1]
    tiles = base_weight(base, site).reshape(site.out_features // r, r, site.in_features // r, r)
    delta = torch.einsum("opis,osq->opiq", tiles, block) + block[:, :, None, :]
    return reducer.dense(site, delta.reshape(site.out_features, site.in_features))
