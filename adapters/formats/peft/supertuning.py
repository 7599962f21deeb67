"""PEFT's SUPERTUNING. "Super-Tuning" (2607.09287): entries of W, chosen by magnitude, and a LoRA part ("Supra").

``y += S x + s B A x`` with s = lora_alpha / r. Files without the indices mean the entries of largest (or smallest)
magnitude in the order in which PEFT finds them: served where no two of them are equal, since ties have no order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.formats.entries import sparse_flat, take_indices
from onebase.adapters.formats.fields import MAX_RANK, Fields, refused
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import LowRank, SiteOps

VALUES, INDICES = "supertuning_values", "supertuning_indices"
A, B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


@dataclass(frozen=True, slots=True)
class _Settings:
    """r: 0 without a LoRA part. chosen: the indices are not in the file."""

    sparsity: float
    largest: bool
    chosen: bool
    r: int
    alpha: float


@register(
    "SUPERTUNING",
    title="Super-Tuning",
    paper="2607.09287",
    covers=("Super-Tuning", "Supra"),
    instructions=("Sparse", "LowRank"),
    cost="2n FLOPs for n entries, 6n bytes, and LoRA's",
    note="indices that the file leaves out are found again in the base's weights, if no two are of one magnitude",
)
def compile_supertuning(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings = _read(files.fields)
    groups = sites_with(files, base, (VALUES, INDICES, A, B))
    ops = {group.site.path: _site_ops(group, settings, base) for group in groups}
    return with_saved(ops, files, base)


def _read(fields: Fields) -> _Settings:
    ignore_training(fields, "lora_dropout")
    sparsity = fields.number("sparsity", default=0.99)
    if not 0 <= sparsity < 1:
        raise refused("sparsity", sparsity, "it must be at least 0 and below 1")
    r = fields.integer("r", 0, MAX_RANK, default=0)
    return _Settings(
        sparsity=sparsity,
        largest=fields.flag("select_top", default=True),
        chosen=not fields.flag("save_precomputed_indices", default=True),
        r=r,
        alpha=fields.number("lora_alpha", default=2 * r),
    )


def _site_ops(group: SiteTensors, settings: _Settings, base: BaseModel) -> SiteOps:
    site = group.site
    total = site.in_features * site.out_features
    count = int(total * (1 - settings.sparsity))
    meaning = f"sparsity {settings.sparsity}, {site.in_features} in, {site.out_features} out"
    values = group.take(VALUES, (count,), meaning)
    if settings.chosen:
        places = _find(site, count, settings.largest, base)
    else:
        places = take_indices(group.key(INDICES), group.bag, (count,), (total,), meaning)
    return SiteOps(low_rank=_low_rank(group, settings), extra=(sparse_flat(site, places, values),))


def _find(site: Site, count: int, largest: bool, base: BaseModel) -> Tensor:
    """The places of the ``count`` entries of largest or smallest magnitude, in order."""
    magnitudes = base.weight(site.path).detach().cpu().float().abs().flatten()
    found = torch.topk(magnitudes, min(count + 1, len(magnitudes)), largest=largest)
    if bool((found.values.diff() == 0).any()):
        reason = (
            f"entries of {site.path} tie in magnitude, so the file does not say which it means: "
            "save the adapter again with it set to true"
        )
        raise refused("save_precomputed_indices", False, reason)
    return found.indices[:count]


def _low_rank(group: SiteTensors, settings: _Settings) -> LowRank | None:
    if not settings.r:
        return None
    site, r = group.site, settings.r
    meaning = f"r {r}, {site.in_features} in, {site.out_features} out"
    a = group.take(A, (r, site.in_features), meaning)
    b = group.take(B, (site.out_features, r), meaning)
    return LowRank(a, b.T.contiguous(), settings.alpha / r)
