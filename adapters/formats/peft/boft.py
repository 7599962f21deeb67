"""PEFT's BOFT. Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization" (2311.06243).

``y = s * (W (x R)) + b`` with R a product of block-diagonal matrices under butterfly permutations, each block the
Cayley transform of the skew part of what the file has.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import Fields, refused
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.peft.oft import MAX_BLOCKS, cayley_turn, check_block_size
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.rotate import BlockRotateIn, ButterflyIn
from onebase.kernels.ops.vector import ScaleOut

R, S = "boft_R", "boft_s"
MAX_FACTORS = 16


@dataclass(frozen=True, slots=True)
class _Settings:
    """One of size (of a block) and count (of blocks) is 0."""

    size: int
    count: int
    factors: int


@register(
    "BOFT",
    title="BOFT",
    paper="2311.06243",
    covers=("BOFT",),
    instructions=("BlockRotateIn", "ButterflyIn", "ScaleOut", "AddOut"),
    cost="2hkm FLOPs for m factors of blocks of k, hkm elements",
    note="a file with one factor is served whatever the config says, as PEFT without its CUDA extension writes it",
)
def compile_boft(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings = _read(files.fields)
    ops = {group.site.path: _site_ops(group, settings, base) for group in sites_with(files, base, (R, S))}
    return with_saved(ops, files, base)


def _read(fields: Fields) -> _Settings:
    ignore_training(fields, "boft_dropout")
    size = fields.integer("boft_block_size", 0, MAX_BLOCKS, default=4)
    count = fields.integer("boft_block_num", 0, MAX_BLOCKS, default=0)
    if (size == 0) == (count == 0):
        raise refused("boft_block_size", size, f"exactly one of it and boft_block_num ({count}) must be set")
    return _Settings(size, count, fields.integer("boft_n_butterfly_factor", 1, MAX_FACTORS, default=1))


def _site_ops(group: SiteTensors, settings: _Settings, base: BaseModel) -> SiteOps:
    site = group.site
    gain = group.take(S, (site.out_features, 1), f"{site.out_features} out").squeeze(1) - 1
    bias = base.bias(site.path)
    add_out = None if bias is None else -gain * bias.float().cpu()
    return SiteOps(add_out=add_out, extra=(_rotation(group, settings), ScaleOut(gain)))


def _rotation(group: SiteTensors, settings: _Settings) -> BlockRotateIn | ButterflyIn:
    size = settings.size or _whole(group.site, settings.count)
    check_block_size(group.site.path, size)
    count = _whole(group.site, size)
    factors = 1 if group.shape(R)[:1] == (1,) else settings.factors
    meaning = f"{factors} factors of {count} blocks of {size} by the config, {group.site.in_features} in"
    raw = group.take(R, (factors, count, size, size), meaning).double()
    if factors == 1:
        return BlockRotateIn(_turns(raw[0]), group.site.in_features)
    if size % 2 or count % (1 << (factors - 1)):
        reason = f"{count} blocks of {size} in {group.site.path} cannot be paired so often"
        raise refused("boft_n_butterfly_factor", factors, reason)
    return ButterflyIn(_turns(raw.flatten(0, 1)).view(raw.shape))


def _turns(raw: Tensor) -> Tensor:
    return cayley_turn((raw - raw.transpose(1, 2)) / 2).float()


def _whole(site: Site, part: int) -> int:
    if site.in_features % part:
        message = f"{site.path} has {site.in_features} in, which blocks ({part} by the config) do not divide."
        raise AdapterRejected(message, param=site.path)
    return site.in_features // part
