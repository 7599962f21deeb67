"""PEFT's HRA. Yuan et al., "Householder reflection adaptation" (2405.17484).

W is multiplied by r reflections, ``W' = W H_1 ... H_r`` with ``H_i = I - 2 u_i u_i^T`` and u_i the i-th column of
``hra_u`` made a unit. Their product is ``I - U T U^T``: the update is ``-(W U T) U^T``, of exact rank r. T is the
inverse of U^T U's strict upper triangle plus one half on the diagonal (the compact WY form); with ``apply_GS`` the u_i
are made orthonormal first, and T is 2 I.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.derived import base_weight, finite
from onebase.adapters.formats.fields import MAX_RANK, refused
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import with_saved
from onebase.adapters.formats.targets import ignore_training, sites_with
from onebase.adapters.program import SiteOps

_DEPENDENT = 1e-5


@register(
    "HRA",
    title="HRA",
    paper="2405.17484",
    instructions=("LowRank",),
    cost="4hr FLOPs, 2hr elements",
    note="reads the base's weight at load; with apply_GS, vectors that depend on each other are refused",
)
def compile_hra(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    ignore_training(files.fields)
    r = files.fields.integer("r", 1, MAX_RANK)
    orthonormal = files.fields.flag("apply_GS")
    reducer = Reducer()
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, ("hra_u",)):
        site = tensors.site
        unit = _units(site, tensors.take("hra_u", (site.in_features, r), f"in_features and r {r}").double())
        u, w = _gram_schmidt(site, unit) if orthonormal else _compact(unit)
        ops[site.path] = reducer.product(site, u.T.float(), -(base_weight(base, site) @ w.float()).T)
    return with_saved(ops, files, base)


def _units(site: Site, u: Tensor) -> Tensor:
    return finite(u / u.norm(dim=0), site, "a column of hra_u is zero, so it names no reflection")


def _compact(unit: Tensor) -> tuple[Tensor, Tensor]:
    """U and U T, [in_features, r] both."""
    inverse = (unit.T @ unit).triu(1) + torch.eye(unit.shape[1], dtype=unit.dtype) / 2
    return unit, torch.linalg.solve_triangular(inverse, unit, upper=True, left=False)


def _gram_schmidt(site: Site, unit: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal Q of the columns in order, and 2 Q; the signs of Q fall out."""
    width, r = unit.shape
    if r > width:
        raise refused("r", r, f"apply_GS finds at most {width} independent vectors in {site.path}")
    q, upper = torch.linalg.qr(unit)
    if float(upper.diagonal().abs().min()) < _DEPENDENT:
        raise AdapterRejected(
            f"{site.path}: the columns of hra_u depend on each other, and apply_GS would divide by nearly zero.",
            param="apply_GS",
        )
    return q, 2 * q
