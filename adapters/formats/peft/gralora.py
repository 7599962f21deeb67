"""PEFT's GRALORA. Jung et al., "GraLoRA" (2505.20355).

The weight is cut into k x k blocks, each with a low-rank delta of its own of rank r / k. Block column n and block row j
have the factors ``A[n, :, part j]`` and ``B[j, part n, :]``, so the whole is of rank k r, with factors that are zero
outside one block. hybrid_r adds an ordinary low-rank part. s = alpha / (r + hybrid_r).
"""

from __future__ import annotations

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import MAX_RANK, Fields, refused
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps

_A, _B = "gralora_A", "gralora_B"
_GENERAL_A, _GENERAL_B = "gralora_A_general.weight", "gralora_B_general.weight"


@register(
    "GRALORA",
    title="GraLoRA",
    paper="2505.20355",
    covers=("GraLoRA",),
    instructions=("LowRank", "Dense"),
    cost="4hrk FLOPs, 2hrk elements for k x k blocks; dense where that is less",
    note="hybrid_r",
)
def compile_gralora(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    rank, blocks, hybrid, scale = _read(files.fields)
    reducer = Reducer()
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, (_A, _B, _GENERAL_A, _GENERAL_B)):
        site = tensors.site
        reducer.spend(site.path, (rank * blocks + hybrid) * (site.in_features + site.out_features))
        a, b = _blocks(tensors, rank, blocks)
        if hybrid:
            meaning = f"hybrid_r is {hybrid}"
            a = torch.cat([a, tensors.take(_GENERAL_A, (hybrid, site.in_features), meaning)])
            b = torch.cat([b, tensors.take(_GENERAL_B, (site.out_features, hybrid), meaning).T])
        ops[site.path] = reducer.product(site, a, b, scale)
    return with_saved(ops, files, base, Beside(weight=True))


def _read(fields: Fields) -> tuple[int, int, int, float]:
    """r, gralora_k, hybrid_r and the scale."""
    ignore_training(fields, "gralora_dropout")
    rank, blocks = fields.integer("r", 1, MAX_RANK), fields.integer("gralora_k", 1, MAX_RANK)
    hybrid = fields.integer("hybrid_r", 0, MAX_RANK, 0)
    if rank % blocks:
        raise refused("r", rank, f"it must be a multiple of gralora_k, {blocks}")
    return rank, blocks, hybrid, fields.number("alpha") / (rank + hybrid)


def _blocks(tensors: SiteTensors, rank: int, blocks: int) -> tuple[Tensor, Tensor]:
    """[blocks * rank, in_features], [blocks * rank, out_features]."""
    site, part = tensors.site, rank // blocks
    width, out = _block_sizes(site, blocks)
    meaning = f"r is {rank}, gralora_k is {blocks}, {site.in_features} in, {site.out_features} out"
    a = tensors.take(_A, (blocks, width, rank), meaning).view(blocks, width, blocks, part)
    b = tensors.take(_B, (blocks, rank, out), meaning).view(blocks, blocks, part, out)
    downs = a.new_zeros(blocks, blocks, part, blocks, width)  # of block column n, block row j; then where it reads
    ups = b.new_zeros(blocks, blocks, part, blocks, out)
    for n in range(blocks):
        downs[n, :, :, n] = a[n].permute(1, 2, 0)
        ups[:, n, :, n] = b[n]
    return downs.flatten(3).flatten(0, 2), ups.flatten(3).flatten(0, 2)


def _block_sizes(site: Site, blocks: int) -> tuple[int, int]:
    if site.in_features % blocks or site.out_features % blocks:
        raise AdapterRejected(
            f"gralora_k is {blocks}, which does not divide {site.path} ({site.in_features} in, {site.out_features} "
            "out) into blocks.",
            param="gralora_k",
        )
    return site.in_features // blocks, site.out_features // blocks
