"""PEFT's DEFT. Kumar et al., "DEFT" (2509.22793); its ``para`` is PaRa, Chen et al. (2406.05641).

A subspace of the outputs is taken out of W and written anew: ``y += Q (s R x - V^T W x)``, of exact rank r. The file
has P; with ``decomposition_method`` "relu" Q is P and V its positive part, with "qr" both are P's orthonormal basis.
``para`` leaves the injection R out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel
from onebase.adapters.formats.derived import base_weight
from onebase.adapters.formats.fields import MAX_RANK, Fields
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import with_saved
from onebase.adapters.formats.targets import ignore_training, sites_with
from onebase.adapters.program import SiteOps

P, R = "deft_P", "deft_R"


@dataclass(frozen=True, slots=True)
class _Settings:
    """alpha: 0 where the injection is not scaled."""

    r: int
    alpha: float
    orthogonal: bool
    removes_only: bool


@register(
    "DEFT",
    title="DEFT",
    paper="2509.22793",
    covers=("PaRa",),
    instructions=("LowRank",),
    cost="4hr FLOPs, 2hr elements",
    note="reads the base's weight at load; 'relu', 'qr', para and alpha are served",
)
def compile_deft(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings = _read(files.fields)
    reducer = Reducer()
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, (P, R)):
        site, rank = tensors.site, min(settings.r, tensors.site.out_features)
        basis, right = _projection(tensors.take(P, (site.out_features, rank), "out_features and r"), settings)
        a = -(right.T @ base_weight(base, site))
        if not settings.removes_only:
            scale = settings.alpha / rank if settings.alpha else 1.0
            a += tensors.take(R, (rank, site.in_features), "r and in_features") * scale
        ops[site.path] = reducer.product(site, a, basis.T)
    return with_saved(ops, files, base)


def _read(fields: Fields) -> _Settings:
    ignore_training(fields, "deft_dropout", "init_scale")
    method = fields.choice("decomposition_method", ("relu", "qr"), "relu", "'relu' and 'qr' exist")
    return _Settings(
        r=fields.integer("r", 1, MAX_RANK),
        alpha=fields.number("alpha", default=0),
        orthogonal=method == "qr",
        removes_only=fields.flag("para"),
    )


def _projection(p: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """Q and V, [out_features, rank]. In float32 like PEFT: the injection depends on the signs of the basis."""
    if not settings.orthogonal:
        return p, torch.relu(p)
    basis = torch.linalg.qr(p).Q
    return basis, basis
