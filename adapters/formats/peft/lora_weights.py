"""What a LORA's operations take from the base's weight: DoRA's norms, and the part that PiSSA, OLoRA and KaSA remove.

Liu et al., "DoRA" (2402.09353); Meng et al., "PiSSA" (2404.02948); Büyükakyüz, "OLoRA" (2406.01775); Wang et al.,
"KaSA" (2412.06071). Read in float32, accumulated in float64 where sums cancel; some rows at a time, so that no product
of the size of the weight is ever held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.peft.lora_settings import Shift

_ROWS = 1024


def dora_factor(site: Site, base: BaseModel, magnitude: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """magnitude / |W + b a| for each output feature of a linear site, [out_features] float32.

    a: [rank, in_features]; b: [out_features, rank], scale included.
    """
    weight = base.weight(site.path)
    norms = [
        torch.linalg.vector_norm(_float(weight[start : start + _ROWS]) + b[start : start + _ROWS] @ a, dim=1)
        for start in range(0, len(weight), _ROWS)
    ]
    return _divided(site, magnitude, torch.cat(norms))


def dora_token_factor(site: Site, base: BaseModel, magnitude: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same for an embedding, whose norms run over the vocabulary: [width] float32.

    a: [vocabulary, rank]; b: [rank, width], scale included.
    """
    weight = base.weight(site.path)
    squares = torch.zeros(site.out_features, dtype=torch.float64)
    for start in range(0, len(weight), _ROWS):
        rows = _float(weight[start : start + _ROWS]) + a[start : start + _ROWS] @ b
        squares += rows.double().square().sum(0)
    return _divided(site, magnitude, squares.sqrt().float())


def shifted_part(shift: Shift, site: Site, base: BaseModel, rank: int) -> tuple[Tensor, Tensor]:
    """The part of W that PEFT takes out, as (a [rank, in_features], b [rank, out_features]): ``b^T a``.

    Raises AdapterRejected where the weight has no such part.
    """
    smaller = min(site.in_features, site.out_features)
    if rank > smaller or (shift is Shift.SMALLEST and rank == smaller):
        raise AdapterRejected(
            f"{site.path} has rank {rank}, which is too much for the {shift} of a weight with {smaller}.", param="r"
        )
    weight = _float(base.weight(site.path))
    if shift is Shift.FIRST:
        basis = torch.linalg.qr(weight[:, :rank])[0]
        return basis.T @ weight, basis.T.contiguous()
    return _singular_part(weight, rank, largest=shift is Shift.LARGEST)


def _singular_part(weight: Tensor, rank: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """By the same SVD in float32 that PEFT runs: a more exact one would take out another part than PEFT does, by some
    1e-6 of W's entries, which a deep model turns into more."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    at = slice(0, rank) if largest else slice(len(s) - rank, len(s))
    return v[at].contiguous(), (u[:, at] * s[at]).T.contiguous()


def _divided(site: Site, magnitude: Tensor, norms: Tensor) -> Tensor:
    factor = magnitude.float() / norms
    if not bool(torch.isfinite(factor).all()):
        raise AdapterRejected(f"{site.path}: a norm that DoRA divides by is zero.", param=site.path)
    return factor


def _float(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32)
