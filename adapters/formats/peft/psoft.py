"""PEFT's PSOFT. Wu et al., "Efficient orthogonal fine-tuning with principal subspace adaptation" (2505.11235).

W's r largest singular triples are turned: ``delta W = U sqrt(S).. (R - I) ..V^T``, where all of S stands left of R for
``ab_svd_init`` "psoft_init", its root on both sides for "pissa_init". The scale alpha / r cancels against PEFT's own
division of S by it. R is orthogonal, Cayley's (I + Q)(I - Q)^-1 of a skew Q or its Neumann series, or any matrix where
``psoft_orth`` is false; ``vector_b`` scales its rows, ``vector_a`` its columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel
from onebase.adapters.formats.derived import finite
from onebase.adapters.formats.fields import MAX_RANK, Fields, as_number, refused
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import with_saved
from onebase.adapters.formats.spectral_basis import full_svd, seeded_svd
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps

WEIGHT, ROWS, COLUMNS = "psoft_R.weight", "psoft_R.vector_b", "psoft_R.vector_a"
MAX_TERMS = 32
MAX_ITERATIONS = 64


@dataclass(frozen=True, slots=True)
class _Settings:
    """terms: of the Neumann series, 0 for Cayley's own. limit: on Q's norm in the series, or None. seed, iterations: of
    the randomised decomposition; iterations None means the full one."""

    r: int
    split: bool
    orthogonal: bool
    rows: bool
    columns: bool
    terms: int
    limit: float | None
    iterations: int | None
    seed: int


@register(
    "PSOFT",
    title="PSOFT",
    paper="2505.11235",
    instructions=("LowRank",),
    cost="4hr FLOPs, 2hr elements",
    note=(
        "decomposes the base's weight at load, on the device where the base lies, like PEFT: the signs of singular "
        "vectors count, and are those of that device's solver; psoft_svd 'full' and 'lowrank', Cayley and Neumann"
    ),
)
def compile_psoft(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings = _read(files.fields)
    reducer = Reducer()
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, (WEIGHT, ROWS, COLUMNS)):
        site = tensors.site
        if settings.r > min(site.in_features, site.out_features):
            raise refused("r", settings.r, f"{site.path} has {site.in_features} inputs, {site.out_features} outputs")
        turn = _rotation(tensors, settings) - torch.eye(settings.r)
        u, s, vt = (part.to("cpu") for part in _decompose(base.weight(site.path).detach().float(), settings))
        root = s.sqrt()
        a, b = (vt * root[:, None], u * root) if settings.split else (vt, u * s)
        ops[site.path] = reducer.product(site, a, (b @ turn).T)
    return with_saved(ops, files, base)


def _read(fields: Fields) -> _Settings:
    ignore_training(fields, "psoft_dropout")
    r = fields.integer("r", 1, MAX_RANK)
    if fields.number("psoft_alpha", default=32) <= 0:
        raise refused("psoft_alpha", "not above 0", "PEFT divides the singular values by psoft_alpha / r")
    series = fields.flag("use_cayley_neumann")
    terms = fields.integer("num_cayley_neumann_terms", 1, MAX_TERMS, default=5)
    limit = fields.take("cayley_neumann_eps")
    if limit is not None and not 0 < as_number("cayley_neumann_eps", limit) < 1:
        raise refused("cayley_neumann_eps", limit, "it must lie between 0 and 1")
    iterations = fields.integer("psoft_svd_lowrank_niter", 0, MAX_ITERATIONS, default=10)
    method = fields.choice("psoft_svd", ("full", "lowrank"), "full", "'full' and 'lowrank' exist")
    start = fields.choice(
        "ab_svd_init", ("psoft_init", "pissa_init"), "psoft_init", "'psoft_init' and 'pissa_init' exist"
    )
    return _Settings(
        r=r,
        split=start == "pissa_init",
        orthogonal=fields.flag("psoft_orth", default=True),
        rows=fields.flag("psoft_mag_b", default=True),
        columns=fields.flag("psoft_mag_a", default=True),
        terms=terms if series else 0,
        limit=None if limit is None else as_number("cayley_neumann_eps", limit),
        iterations=iterations if method == "lowrank" else None,
        seed=fields.integer("random_seed", 0, (1 << 63) - 1, default=None if method == "lowrank" else 0),
    )


def _decompose(weight: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    r = settings.r
    if settings.iterations is None:
        u, s, vt = full_svd(weight)
        return u[:, :r], s[:r], vt[:r]
    return seeded_svd(weight, r, iterations=settings.iterations, seed=settings.seed)


def _rotation(tensors: SiteTensors, settings: _Settings) -> Tensor:
    """R, [r, r] in float32."""
    r = settings.r
    shape = (r * (r - 1) // 2,) if settings.orthogonal else (r, r)
    weight = tensors.take(WEIGHT, shape, "r and psoft_orth").double()
    turn = _orthogonal(weight, settings) if settings.orthogonal else weight
    if settings.rows:
        turn = tensors.take(ROWS, (r,), "r").double()[:, None] * turn
    if settings.columns:
        turn = turn * tensors.take(COLUMNS, (r,), "r").double()
    return finite(turn.float(), tensors.site, "psoft_R makes no finite matrix")


def _orthogonal(weight: Tensor, settings: _Settings) -> Tensor:
    eye = torch.eye(settings.r, dtype=weight.dtype)
    skew = torch.zeros_like(eye)
    skew[tuple(torch.triu_indices(settings.r, settings.r, 1))] = weight
    skew -= skew.T.clone()
    if not settings.terms:
        turn: Tensor = torch.linalg.solve(eye - skew, eye + skew, left=False)
        return turn
    norm = torch.linalg.norm(skew)
    if settings.limit is not None and norm > settings.limit:
        skew *= settings.limit / (norm + 1e-12)
    return _series(eye, skew, settings.terms)


def _series(eye: Tensor, skew: Tensor, terms: int) -> Tensor:
    """I + 2 (Q + Q^2 + ...) + the last power once; three terms and four are the same to PEFT."""
    total = eye.clone()
    if terms > 1:
        total += 2 * skew
    if terms > 2:
        power = skew @ skew
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total += 2 * power
        total += power @ skew
    return total
