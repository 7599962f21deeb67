"""PEFT's RANDLORA. Albert et al., "RandLoRA" (2502.00987).

A sum of n random products of rank r, n r >= min(in, out), so of full rank: dense at load. With min and max the smaller
and the larger side of a module, ``small[k n + i] = lambda[k, i] * A[k] * gamma[i]`` over the smaller side and
``big[:, j r + l] = B[:, j, l]`` over the larger one. PEFT multiplies the two as they lie, although one counts the
products fast and the other the ranks; that is what training saw, so it is the definition. s = alpha / r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import MAX_RANK, Fields
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.keys import group_by_site
from onebase.adapters.formats.projections import largest, read_seed, refuse_saved, seeded
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with, take_global
from onebase.adapters.program import SiteOps

_A, _B = "randlora_A", "randlora_B"
_LAMBDA, _GAMMA = "randlora_lambda", "randlora_gamma"
_SPARSITY = 3


@dataclass(frozen=True, slots=True)
class RandLoraSettings:
    rank: int
    scale: float
    saved: bool
    seed: int
    sparse: bool
    very_sparse: bool


@register(
    "RANDLORA",
    title="RandLoRA",
    paper="2502.00987",
    covers=("RandLoRA",),
    instructions=("Dense",),
    cost="2h^2 FLOPs, h^2 elements",
    note="full rank; bases saved, or drawn again from projection_prng_key; unfolded at load, 2h^3 FLOPs for a module",
)
def compile_randlora(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings, reducer = _read(files.fields), Reducer()
    sites = sites_with(files, base, (_LAMBDA, _GAMMA))
    if not sites:
        return with_saved({}, files, base)
    width, out = largest(sites)
    sizes = (settings.rank, min(width, out), max(width, out))
    reducer.spend("the random bases", math.prod(_shapes(sizes)[1]))
    a, b = _saved(files, base, sizes) if settings.saved else _drawn(files, sizes, settings)
    ops = {s.site.path: _site_ops(s, a, b, settings, reducer) for s in sites}
    return with_saved(ops, files, base, Beside(weight=True))


def _read(fields: Fields) -> RandLoraSettings:
    ignore_training(fields, "randlora_dropout")
    rank = fields.integer("r", 1, MAX_RANK)
    return RandLoraSettings(
        rank=rank,
        scale=fields.number("randlora_alpha") / rank,
        saved=fields.flag("save_projection", default=True),
        seed=read_seed(fields, "projection_prng_key", 0),
        sparse=fields.flag("sparse"),
        very_sparse=fields.flag("very_sparse"),
    )


def _shapes(sizes: tuple[int, int, int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of A and of B, for (rank, smaller side, larger side)."""
    rank, small, large = sizes
    return (rank, 1, small), (large, -(-small // rank), rank)


def _saved(files: AdapterFiles, base: BaseModel, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """PEFT writes the bases once for the adapter and again for every module: the copies must be equal."""
    shapes = dict(zip((_A, _B), _shapes(sizes), strict=True))
    meaning = "r, and the targeted modules' largest sides"
    bases = {name: take_global(files.tensors, name, shape, meaning) for name, shape in shapes.items()}
    for keys in group_by_site(files.tensors, base, (_A, _B)).values():
        for name, key in keys.items():
            copy = files.tensors.take(key).float()
            if copy.shape != bases[name].shape or not torch.equal(copy, bases[name]):
                raise AdapterRejected(f"The tensor {key!r} differs from 'base_model.{name}'.", param=key)
    return bases[_A], bases[_B]


def _drawn(files: AdapterFiles, sizes: tuple[int, int, int], settings: RandLoraSettings) -> tuple[Tensor, Tensor]:
    refuse_saved(files, _A, _B)
    generator = seeded(settings.seed)
    if settings.very_sparse:
        return _sparse(sizes, math.sqrt(sizes[1]), generator)
    return _sparse(sizes, _SPARSITY, generator) if settings.sparse else _uniform(sizes, generator)


def _uniform(sizes: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Kaiming's uniform distribution, in bfloat16, B one product at a time."""

    def draw(*shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16)
        return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

    shape_a, (large, products, rank) = _shapes(sizes)
    a = draw(*shape_a)
    b = torch.cat([draw(large, 1, rank) for _ in range(products)], dim=1)
    return (a / a.std()).float(), (b / b.std()).float()


def _sparse(sizes: tuple[int, int, int], sparsity: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """-1, 0 and 1, by where a uniform number lies."""

    def draw(shape: Sequence[int]) -> Tensor:
        drawn = torch.rand(*shape, generator=generator)
        edge = 1 / (2 * sparsity)
        signs = (drawn > 1 - edge).float() - (drawn < edge).float()
        return signs / signs.std()

    shape_a, shape_b = _shapes(sizes)
    a = draw(shape_a)
    return a, draw(shape_b)


def _site_ops(tensors: SiteTensors, a: Tensor, b: Tensor, settings: RandLoraSettings, reducer: Reducer) -> SiteOps:
    site, rank = tensors.site, settings.rank
    small, large = sorted((site.in_features, site.out_features))
    products = -(-small // rank)
    meaning = f"r is {rank}, the smaller side is {small}"
    weights = tensors.take(_LAMBDA, (rank, products), meaning)
    gamma = tensors.take(_GAMMA, (products, small), meaning)
    reducer.spend(site.path, site.in_features * site.out_features)
    narrow = (weights[:, :, None] * a[:, :, :small] * gamma).flatten(0, 1)  # [rank * products, small]
    delta = b[:large, :products].flatten(1) @ narrow  # [large, small]
    return reducer.dense(site, (delta if small == site.in_features else delta.T) * settings.scale)
