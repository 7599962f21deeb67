"""PEFT's OFT. Qiu et al., "Orthogonal Finetuning" (2306.07280); the Cayley-Neumann series: OFTv2 (2506.19847).

``y = W (x R) + b`` with R block-diagonal. The file has the upper triangles of skew matrices Q, one for each block:
R = (I - Q)(I + Q)^-1, or a series for it. ``coft`` bounds Q's norm, ``block_share`` uses one block everywhere. Of an
embedding it rotates the output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, SiteKind
from onebase.adapters.errors import AdapterRejected, AdapterTooLarge
from onebase.adapters.formats.fields import Fields, refused
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.keys import group_by_site
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.rotate import BlockRotateIn, TokenRotate

R, TOKEN_R = "oft_R.weight", "oft_embedding_R.weight"
MAX_BLOCKS = 1 << 16
MAX_BLOCK_SIZE = 4096  # transforms of one block take its cube of work
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
    instructions=("BlockRotateIn", "TokenRotate"),
    cost="2hk FLOPs for blocks of k, hk elements",
    note="Cayley transforms and series are computed at load; files of PEFT before 0.16 have another layout",
)
def compile_oft(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings = _read(files.fields)
    ops = {group.site.path: SiteOps(extra=(_token_rotation(group, settings),)) for group in _embeddings(files, base)}
    for group in sites_with(files, base, (R,)):
        width = group.site.in_features
        ops[group.site.path] = SiteOps(extra=(BlockRotateIn(_turn(group, R, width, settings), width),))
    return with_saved(ops, files, base)


def _read(fields: Fields) -> _Settings:
    ignore_training(fields, "module_dropout")
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


def _embeddings(files: AdapterFiles, base: BaseModel) -> Iterator[SiteTensors]:
    for path, keys in group_by_site(files.tensors, base, (TOKEN_R,)).items():
        site = base.sites[path]
        if site.kind is not SiteKind.EMBEDDING:
            message = f"The tensor {keys[TOKEN_R]!r} is an embedding's, and {path} is a {site.kind} of the base."
            raise AdapterRejected(message, param=keys[TOKEN_R])
        yield SiteTensors(site, keys, files.tensors)


def _token_rotation(group: SiteTensors, settings: _Settings) -> TokenRotate:
    width = group.site.out_features
    return TokenRotate(_turn(group, TOKEN_R, width, settings), width)


def _turn(group: SiteTensors, suffix: str, width: int, settings: _Settings) -> Tensor:
    """The rotation's blocks less the identity, float32."""
    size = settings.block_size(width)
    check_block_size(group.site.path, size)
    blocks = 1 if settings.shared else width // size
    shape = (blocks, size * (size - 1) // 2)
    skew = _skew(group.take(suffix, shape, f"{blocks} blocks of {size} by the config, {width} wide"), size)
    if settings.bound is not None:
        skew = _bounded(skew, settings.bound)
    turn = cayley_turn(skew) if settings.terms is None else _series_turn(skew, settings.terms)
    return turn.float()


def check_block_size(path: str, size: int) -> None:
    """Raises AdapterTooLarge over MAX_BLOCK_SIZE."""
    if size > MAX_BLOCK_SIZE:
        message = f"{path} is rotated in blocks of {size}; at most {MAX_BLOCK_SIZE} are allowed."
        raise AdapterTooLarge(message, param=path)


def cayley_turn(skew: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1 - I = -2 Q (I + Q)^-1 for [blocks, size, size] float64."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    turn: Tensor = torch.linalg.solve(identity + skew, -2 * skew, left=False)
    return turn


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
