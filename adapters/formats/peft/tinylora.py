"""PEFT's TINYLORA. "TinyLoRA" (2602.04118), over LoRA-XS.

``y += B R A x`` with A and B from the base's singular vectors (the file has them) and ``R = sum_i v_i P_i``: v is
trained and shared by a group of modules, P is random, saved or drawn again from projection_seed and the module's place
among the targeted ones. At an embedding, ``y += B[token] R A``, after any scale of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import MAX_RANK, Fields, refused
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.projections import read_seed, seeded
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with, take_global
from onebase.adapters.program import SiteOps, TokenLowRank

_A, _B, _P = "tinylora_A", "tinylora_B", "tinylora_P"
_MAX_COUNT = 1 << 20


@dataclass(frozen=True, slots=True)
class TinyLoraSettings:
    """count: elements of v; tying: 0 gives every module a v of its own, 1 gives all the same."""

    rank: int
    count: int
    tying: float
    seed: int
    saved: bool


@register(
    "TINYLORA",
    title="TinyLoRA",
    paper="2602.04118",
    covers=("TinyLoRA", "LoRA-XS"),
    instructions=("LowRank", "TokenLowRank"),
    cost="4hr FLOPs, 2hr elements",
    note="projections saved, or drawn again from projection_seed; embeddings too",
)
def compile_tinylora(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings, reducer = _read(files.fields), Reducer()
    sites = sites_with(files, base, (_A, _B, _P), (SiteKind.LINEAR, SiteKind.EMBEDDING))
    vectors = _vectors(files, sites, settings)
    places = zip(sites, vectors, strict=True)
    ops = {s.site.path: _site_ops(s, at, v, settings, reducer) for at, (s, v) in enumerate(places)}
    return with_saved(ops, files, base, Beside(weight=True))


def _read(fields: Fields) -> TinyLoraSettings:
    ignore_training(fields, "init_v_bound", "tinylora_dropout")
    tying = fields.number("weight_tying", 0.0)
    if not 0 <= tying <= 1:
        raise refused("weight_tying", tying, "it must lie between 0 and 1")
    return TinyLoraSettings(
        rank=fields.integer("r", 1, MAX_RANK),
        count=fields.integer("u", 1, _MAX_COUNT),
        tying=tying,
        seed=read_seed(fields, "projection_seed", 42),
        saved=fields.flag("save_projection", default=True),
    )


def _vectors(files: AdapterFiles, sites: Sequence[SiteTensors], settings: TinyLoraSettings) -> list[Tensor]:
    """v of each site. The sites fall into groups of equal size, in the model's order; the last one takes the rest."""
    groups = max(1, round(len(sites) * (1 - settings.tying)))
    size = max(1, len(sites) // groups)
    numbers = [min(at // size, groups - 1) for at in range(len(sites))]
    meaning = f"u is {settings.count}"
    found = {n: take_global(files.tensors, f"tinylora_v.{n}", (settings.count,), meaning) for n in sorted(set(numbers))}
    return [found[number] for number in numbers]


def _site_ops(tensors: SiteTensors, at: int, v: Tensor, settings: TinyLoraSettings, reducer: Reducer) -> SiteOps:
    """at: the site's place among the adapter's."""
    site = tensors.site
    embedding = site.kind is SiteKind.EMBEDDING
    rows, columns = (site.in_features, site.out_features) if embedding else (site.out_features, site.in_features)
    rank = min(settings.rank, rows, columns)
    meaning = f"r is {settings.rank}, the base's weight is {rows} x {columns}"
    a = tensors.take(_A, (rank, columns), meaning)
    b = tensors.take(_B, (rows, rank), meaning)
    r = torch.einsum("i,ijk->jk", v, _projection(tensors, at, rank, settings, reducer))
    if embedding:
        return SiteOps(token_low_rank=TokenLowRank(b @ r, a, 1.0))
    return reducer.product(site, r @ a, b.T)


def _projection(tensors: SiteTensors, at: int, rank: int, settings: TinyLoraSettings, reducer: Reducer) -> Tensor:
    """[u, rank, rank]."""
    shape = (settings.count, rank, rank)
    reducer.spend(tensors.site.path, math.prod(shape))
    if settings.saved:
        return tensors.take(_P, shape, f"u is {settings.count}, the rank is {rank}")
    if _P in tensors:
        key = tensors.key(_P)
        message = f"save_projection is false, and yet the file has {key!r}. Set it to true to use it."
        raise AdapterRejected(message, param="save_projection")
    generator = seeded(settings.seed + at)
    return torch.normal(0.0, 1 / math.sqrt(rank), shape, generator=generator)
