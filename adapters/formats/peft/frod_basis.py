"""FROD's shared basis, computed from the base's weights as PEFT does when a file does not have it.

Modules that play one role in different layers ("self_attn_q_proj") are a category and share V, and the places of the
sparse core's entries. All of it is deterministic up to the eigenvectors of the machine's LAPACK.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.derived import base_weight
from onebase.adapters.formats.fields import refused

MAX_WIDTH = 8192  # a permutation of its square is drawn


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """v: [width, width] float32. index: [2, entries] int64, where the sparse core has them."""

    v: Tensor
    index: Tensor


@dataclass(frozen=True, slots=True)
class Recipe:
    """rate: the core's share of entries. ridge: regularization_alpha."""

    seed: int
    rate: float
    ridge: float


def category_of(path: str) -> str:
    """The last two parts of a module's path; the last alone where a layer's number stands before it."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-2:] == ["output", "dense"] and len(parts) >= 3 and parts[-3] == "attention":
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def compute_bases(sites: Iterable[Site], base: BaseModel, recipe: Recipe) -> Mapping[str, Basis]:
    """One basis for each category. Raises AdapterRejected where PEFT's grouping would lose a module."""
    groups: dict[str, dict[int, Site]] = {}
    for site in sites:
        group = groups.setdefault(category_of(site.path), {})
        if group.setdefault(_layer_of(site.path), site) is not site:
            raise AdapterRejected(f"{site.path}: two modules of this name in one layer share a basis.", param=site.path)
        if site.in_features > MAX_WIDTH:
            message = (
                f"{site.path} has {site.in_features} inputs; without save_projection at most {MAX_WIDTH} are served."
            )
            raise AdapterRejected(message, param="save_projection")
    if recipe.ridge <= 0:
        raise refused("regularization_alpha", recipe.ridge, "it must be above 0 where the basis is computed")
    generator = torch.Generator().manual_seed(recipe.seed)
    bases: dict[str, Basis] = {}
    for category in sorted(groups):
        members = [site for _, site in sorted(groups[category].items())]
        v = _joint_basis([base_weight(base, site) for site in members], recipe.ridge)
        v = v.to(base.weight(members[0].path).dtype).float()
        bases[category] = Basis(v, _places(members[0], recipe, generator))
    return bases


def _layer_of(path: str) -> int:
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), -1)


def _joint_basis(weights: Sequence[Tensor], ridge: float) -> Tensor:
    """weights: [out_i, width] each. The eigenvectors of what their parts of one QR have in common, through R."""
    stacked = torch.cat(list(weights))
    if stacked.shape[0] < stacked.shape[1]:
        basis: Tensor = torch.linalg.svd(stacked, full_matrices=True)[2].T
        return basis
    q, r = torch.linalg.qr(stacked)
    eye = torch.eye(r.shape[1])
    total = torch.zeros_like(eye)
    for part in torch.split(q, [len(weight) for weight in weights]):
        total += torch.linalg.inv(part.T @ part + ridge * eye)
    v: Tensor = r.T @ torch.linalg.eigh(total / len(weights))[1]
    return v


def _places(site: Site, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """The first of a permutation of all places off the diagonal, row by row."""
    width = site.in_features
    places = width * (width - 1)
    count = min(int(width * width * recipe.rate), places)
    if recipe.rate > 0 and places:
        count = max(1, count)
    chosen = torch.randperm(places, generator=generator)[:count] if count else torch.empty(0, dtype=torch.long)
    row, column = chosen // max(width - 1, 1), chosen % max(width - 1, 1)
    return torch.stack([row, column + (column >= row).long()])
