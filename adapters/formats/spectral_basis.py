"""Singular vectors of a base weight as PEFT finds them: signs and rounding decide what the adapter's numbers mean.

torch's ``svd_lowrank`` draws from the global generator; here the same steps run on a generator of their own, so that
loading an adapter leaves sampling alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def full_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k], V^T [k, in] of weight [out, in] in float32, k the smaller width."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return u, s, vt


def seeded_svd(weight: Tensor, rank: int, *, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """``svd_lowrank`` after ``manual_seed(seed)``: U [out, rank], S [rank], V^T [rank, in].

    Halko et al., "Finding structure with randomness" (0909.4061), algorithm 5.1 over 4.4.
    """
    wide = weight.shape[0] < weight.shape[1]
    tall = weight.mT if wide else weight
    generator = torch.Generator(weight.device).manual_seed(seed)
    start = torch.randn(tall.shape[1], rank, dtype=weight.dtype, device=weight.device, generator=generator)
    basis = torch.linalg.qr(tall @ start).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(tall.mT @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    inner, s, vt = torch.linalg.svd(basis.mT @ tall, full_matrices=False)
    u = basis @ inner
    return (vt.mT, s, u.mT) if wide else (u, s, vt)
