"""PEFT's UNILORA. Li et al., "Uni-LoRA" (2506.00799).

Every element of every factor is an element of one vector theta_d, times a scale: ``A = theta_d[index] * scale``. Index
and scale are saved (save_indices), or made again: a balanced assignment, shuffled by proj_seed, over the factors of the
targeted modules in the model's order, with scale = 1 / sqrt(uses of the element). Then the file has theta_d alone, and
target_modules says where it acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import MAX_RANK
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.keys import check_shape
from onebase.adapters.formats.projections import read_seed
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targeting import read_targets
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with, take_global
from onebase.adapters.program import SiteOps

_INDICES, _SCALES = "unilora_indices", "unilora_scales"
_SIDES: Final = ("A", "B")
_MAX_LENGTH = 1 << 28
_INDEX_SHARE = 4  # float32s in the memory of one element's index, drawn and shuffled


@dataclass(frozen=True, slots=True)
class _Targets:
    """What is known once the common fields are read. theta: [theta_d_length] float32."""

    rank: int
    theta: Tensor
    reducer: Reducer

    def shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.rank, site.in_features), (site.out_features, self.rank)

    def site_ops(self, site: Site, a: Tensor, b: Tensor) -> SiteOps:
        return self.reducer.product(site, a, b.T)


@register(
    "UNILORA",
    title="Uni-LoRA",
    paper="2506.00799",
    covers=("Uni-LoRA",),
    instructions=("LowRank",),
    cost="4hr FLOPs, 2hr elements",
    note="indices saved, or assigned again from proj_seed with numpy's generator",
)
def compile_unilora(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    fields = files.fields
    saved = fields.flag("save_indices")
    sites: list[Site] = []
    if not saved:
        fields.must_be_unset({"modules_to_save": "without saved indices it would change which modules are targeted"})
        sites = read_targets(fields, base)
    ignore_training(fields, "init_theta_d_bound", "unilora_dropout")
    rank, seed = fields.integer("r", 1, MAX_RANK), read_seed(fields, "proj_seed", 42)
    length = fields.integer("theta_d_length", 1, _MAX_LENGTH)
    theta = take_global(files.tensors, "unilora_theta_d", (length,), f"theta_d_length is {length}")
    targets = _Targets(rank, theta, Reducer())
    ops = _saved(files, base, targets) if saved else _assigned(sites, targets, seed)
    return with_saved(ops, files, base, Beside(weight=True))


def _saved(files: AdapterFiles, base: BaseModel, targets: _Targets) -> dict[str, SiteOps]:
    suffixes = [f"{name}_{side}" for name in (_INDICES, _SCALES) for side in _SIDES]
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, suffixes):
        shapes = zip(_SIDES, targets.shapes(tensors.site), strict=True)
        a, b = (_factor(tensors, side, shape, targets.theta) for side, shape in shapes)
        ops[tensors.site.path] = targets.site_ops(tensors.site, a, b)
    return ops


def _factor(tensors: SiteTensors, side: str, shape: tuple[int, int], theta: Tensor) -> Tensor:
    key = tensors.key(f"{_INDICES}_{side}")
    check_shape(key, tensors.bag, shape, "r and the module's size")
    index = tensors.bag.take_integers(key).long()
    if not 0 <= int(index.min()) <= int(index.max()) < len(theta):
        raise AdapterRejected(f"The tensor {key!r} must hold numbers from 0 to {len(theta) - 1}.", param=key)
    return theta[index] * tensors.take(f"{_SCALES}_{side}", shape, "r and the module's size")


def _assigned(sites: list[Site], targets: _Targets, seed: int) -> dict[str, SiteOps]:
    sizes = [rows * columns for site in sites for rows, columns in targets.shapes(site)]
    targets.reducer.spend("unilora_theta_d", _INDEX_SHARE * sum(sizes))
    index = _balanced(sum(sizes), len(targets.theta), seed)
    uses = torch.bincount(index, minlength=len(targets.theta)).float()
    scaled = targets.theta * torch.where(uses > 0, uses.rsqrt(), 0)
    pieces = iter(torch.split(index, sizes))
    ops: dict[str, SiteOps] = {}
    for site in sites:
        a, b = (scaled[next(pieces)].view(shape) for shape in targets.shapes(site))
        ops[site.path] = targets.site_ops(site, a, b)
    return ops


def _balanced(count: int, length: int, seed: int) -> Tensor:
    """[count] numbers below ``length``, each as often as any other or once more, in an order drawn from the seed."""
    generator = np.random.default_rng(seed)
    each, more = divmod(count, length)
    numbers = np.repeat(np.arange(length), each)
    if more:
        numbers = np.concatenate([numbers, generator.choice(length, size=more, replace=False)])
    generator.shuffle(numbers)
    return torch.from_numpy(numbers)
