"""PEFT's FROD. Wan et al., "FRoD" (2512.23485).

W is replaced by ``U (S + diag(l)) V^T``: V is shared by the modules of one role, U follows from W and V (its columns
are those of ``W V^-T`` made units), S is sparse, and S and l are trained. The update has full rank, so it is dense: U
and V together would take more memory and time than the matrix that they make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.derived import base_weight, finite
from onebase.adapters.formats.fields import Fields, refused
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.keys import check_shape
from onebase.adapters.formats.peft.frod_basis import Basis, Recipe, category_of, compute_bases
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import with_saved
from onebase.adapters.formats.targets import SiteTensors, global_key, ignore_training, sites_with, take_global
from onebase.adapters.program import SiteOps

DIAGONAL, CORE = "frod_lambda_l", "frod_lambda_s_values"
_SMALLEST = 1e-12  # PEFT's: columns of W V^-T that count as zero


@register(
    "FROD",
    title="FRoD",
    paper="2512.23485",
    instructions=("Dense",),
    cost="2h^2 FLOPs, h^2 elements",
    note=(
        "solves for its left factor with the base's weight at load; with save_projection=false the basis too is "
        "computed from the base's weights, as portable as PEFT's own (eigenvectors depend on the machine)"
    ),
)
def compile_frod(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    ignore_training(files.fields, "frod_dropout", "progressbar", "runtime_offload_base_weight")
    found = sites_with(files, base, (DIAGONAL, CORE))
    recipe = _read(files.fields)
    sites = [tensors.site for tensors in found]
    reducer = Reducer()
    for site in sites:
        reducer.spend(site.path, site.in_features * site.out_features)
    saved = files.fields.flag("save_projection", default=True)
    bases = _saved_bases(sites, files, reducer) if saved else compute_bases(sites, base, recipe)
    ops: dict[str, SiteOps] = {}
    for tensors in found:
        basis = bases[category_of(tensors.site.path)]
        delta = _delta(tensors, basis, base_weight(base, tensors.site))
        ops[tensors.site.path] = reducer.dense(tensors.site, delta)
    return with_saved(ops, files, base)


def _read(fields: Fields) -> Recipe:
    rate = fields.number("sparse_rate", default=0.01)
    if not 0 <= rate <= 1:
        raise refused("sparse_rate", rate, "it must lie between 0 and 1")
    seed = fields.integer("projection_prng_key", 0, (1 << 63) - 1, default=0)
    return Recipe(seed, rate, fields.number("regularization_alpha", default=1e-3))


def _saved_bases(sites: Sequence[Site], files: AdapterFiles, reducer: Reducer) -> Mapping[str, Basis]:
    bases: dict[str, Basis] = {}
    for site in sites:
        category, width = category_of(site.path), site.in_features
        if category not in bases:
            reducer.spend(site.path, width * width)
            v = take_global(files.tensors, f"frod_V.{category}", (width, width), f"in_features of {site.path}")
            bases[category] = Basis(v, _saved_places(category, width, files))
        elif len(bases[category].v) != width:
            message = f"frod_V.{category} is for {len(bases[category].v)} inputs, and {site.path} has {width}."
            raise AdapterRejected(message, param=site.path)
    return bases


def _saved_places(category: str, width: int, files: AdapterFiles) -> Tensor:
    size = _take_integers(f"frod_s_size.{category}", 1, files)
    if size.tolist() != [width, width]:
        raise AdapterRejected(f"frod_s_size.{category} must be {[width, width]}.", param=f"frod_s_size.{category}")
    index = _take_integers(f"frod_s_indices.{category}", 2, files)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < width:
        message = f"frod_s_indices.{category} must lie from 0 to {width - 1}."
        raise AdapterRejected(message, param=f"frod_s_indices.{category}")
    return index


def _take_integers(name: str, dims: int, files: AdapterFiles) -> Tensor:
    """int64: [2], or [2, entries]."""
    key = global_key(files.tensors, name)
    if key is None:
        raise AdapterRejected(
            f"The adapter needs a tensor 'base_model.{name}': half an adapter is refused.", param=name
        )
    shape = files.tensors.shape(key)
    check_shape(key, files.tensors, (2, *shape[1:2])[:dims] if len(shape) == dims else (2,) * dims, "rows and columns")
    return files.tensors.take_integers(key).long()


def _delta(tensors: SiteTensors, basis: Basis, weight: Tensor) -> Tensor:
    """[out_features, in_features]: the new weight less the base's."""
    width = tensors.site.in_features
    values = tensors.take(CORE, (basis.index.shape[1],), "as many as frod_s_indices has places")
    core = torch.zeros(width, width).index_put_(tuple(basis.index), values, accumulate=True)
    core.diagonal().add_(tensors.take(DIAGONAL, (width,), "in_features"))
    left = finite(_left(basis.v, weight), tensors.site, "frod_V has no inverse")
    return left @ core @ basis.v.T - weight


def _left(v: Tensor, weight: Tensor) -> Tensor:
    """U, [out_features, in_features]."""
    wide, target = v.double(), weight.double()
    try:
        quotient = torch.linalg.solve(wide, target.T).T
    except RuntimeError:  # torch says so where the matrix is singular
        quotient = target @ torch.linalg.pinv(wide, rtol=1e-6).T
    length = quotient.norm(dim=0)
    return torch.where(length > _SMALLEST, quotient / length.clamp_min(_SMALLEST), 0.0).float()
