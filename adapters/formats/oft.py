"""PEFT's OFT. Qiu et al., "Orthogonal Finetuning" (2306.07280); the Cayley-Neumann series: OFTv2 (2506.19847).

``y = W (x R) + b`` with R block-diagonal. The file has the upper triangles of skew matrices Q, one for each block:
R = (I - Q)(I + Q)^-1, or a series for it. ``coft`` bounds Q's norm, ``block_share`` uses one block everywhere.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel
from onebase.adapters.formats.fields import Fields, refused
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.targets import SiteTensors, sites_with, take_common_fields
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.rotate import BlockRotateIn

R = "oft_R.weight"
MAX_BLOCKS = 1 << 16
MAX_TERMS = 64
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})(\.?(?:dev|a|b|rc)\d*)?")
_SERIES_SINCE = (0, 18, 0, True)


@dataclass(frozen=True, slots=True)
class _Settings:
    """r: number of blocks, 0 where size (of a block) is given. terms: of the series; None: the exact transform.
    bound: of coft; None without it."""

    r: int
    size: int
    terms: int | None
    bound: float | None
    shared: bool

    def block_size(self, features: int) -> int:
        """PEFT takes the nearest divisor where what the config says is none."""
        if self.size:
            return _nearest_divisor(features, self.size)
        return features // _nearest_divisor(features, self.r)


@register(
    "OFT",
    title="OFT",
    paper="2306.07280",
    covers=("OFT", "COFT", "OFTv2"),
    instructions=("BlockRotateIn",),
    cost="2hk FLOPs for blocks of k, hk elements",
    note="Cayley transforms and series are computed at load; files of PEFT before 0.16 have another layout",
)
def compile_oft(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings = _read(files.fields)
    return Compiled({group.site.path: _site_ops(group, settings) for group in sites_with(files, base, (R,))})


def _read(fields: Fields) -> _Settings:
    take_common_fields(fields, "module_dropout")
    r = fields.integer("r", 0, MAX_BLOCKS, default=0)
    size = fields.integer("oft_block_size", 0, MAX_BLOCKS)
    if (r == 0) == (size == 0):
        raise refused("oft_block_size", size, f"exactly one of it and r ({r}) must be set")
    bound = fields.number("eps", default=6e-5)
    return _Settings(
        r=r,
        size=size,
        terms=_terms(fields),
        bound=bound if fields.flag("coft") else None,
        shared=fields.flag("block_share"),
    )


def _terms(fields: Fields) -> int | None:
    reason = "it must be true or false: PEFT's meaning of its absence has changed"
    series = fields.choice("use_cayley_neumann", (True, False), None, reason)
    terms = fields.integer("num_cayley_neumann_terms", 1, MAX_TERMS, default=5)
    if not series:
        return None
    version = _VERSION.match(fields.peft_version)
    if version is None or (*map(int, version.group(1, 2, 3)), version[4] is None) < _SERIES_SINCE:
        raise refused(
            "peft_version",
            fields.peft_version,
            "the Cayley-Neumann series became another one in PEFT 0.18.0: adapters trained before it must be retrained",
        )
    return terms


def _site_ops(group: SiteTensors, settings: _Settings) -> SiteOps:
    width = group.site.in_features
    size = settings.block_size(width)
    blocks = 1 if settings.shared else width // size
    shape = (blocks, size * (size - 1) // 2)
    skew = _skew(group.take(R, shape, f"{blocks} blocks of {size} by the config, {width} in"), size)
    if settings.bound is not None:
        skew = _bounded(skew, settings.bound)
    turn = cayley_turn(skew) if settings.terms is None else _series_turn(skew, settings.terms)
    return SiteOps(extra=(BlockRotateIn(turn.float(), width),))


def cayley_turn(skew: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1 - I = -2 Q (I + Q)^-1 for [blocks, size, size] float64."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return torch.linalg.solve(identity + skew, -2 * skew, left=False)


def _series_turn(skew: Tensor, terms: int) -> Tensor:
    """PEFT's series less the identity: 2 Q + ... + 2 Q^(n-2) + Q^(n-1) for n terms; n = 2 gives 2 Q, n = 3 also keeps
    the factor two at Q^2 and ends with Q^3."""
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    turn, power = torch.zeros_like(skew), skew
    for exponent in range(1, last + 1):
        turn = turn + power * (1.0 if terms > 2 and exponent == last else 2.0)
        power = power @ skew
    return turn


def _bounded(skew: Tensor, bound: float) -> Tensor:
    """Blocks whose norm is over the bound are brought to it."""
    limit = bound / math.sqrt(len(skew))
    norms = torch.linalg.matrix_norm(skew, keepdim=True)
    return torch.where(norms <= limit, skew, skew * (limit / norms.clamp(min=torch.finfo(norms.dtype).tiny)))


def _skew(upper: Tensor, size: int) -> Tensor:
    """[blocks, size (size - 1) / 2] -> [blocks, size, size] in float64."""
    matrix = torch.zeros(len(upper), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    matrix[:, rows, columns] = upper.double()
    return matrix - matrix.transpose(1, 2)


def _nearest_divisor(features: int, wanted: int) -> int:
    """The divisor of features nearest to what is wanted; the smaller of two."""
    if wanted >= features:
        return features
    below = next(number for number in range(wanted, 0, -1) if features % number == 0)
    above = next(number for number in range(wanted, features + 1) if features % number == 0)
    return below if wanted - below <= above - wanted else above
