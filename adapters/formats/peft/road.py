"""PEFT's ROAD. Liao and Monz, "3-in-1: 2D Rotary Adaptation" (2409.00119).

Pairs of outputs (bias included) are rotated and scaled: ``(a, b) -> (a c - b s, b c' + a s')``. The variants differ in
how much the two lines of a pair's matrix, and its two columns, share: road_1 all, road_2 the columns, road_4 nothing.
"""

from __future__ import annotations

from torch import Tensor

from onebase.adapters.base import BaseModel
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.rotate import PairRotateOut

THETA, ALPHA = "road_theta", "road_alpha"
MAX_GROUP = 1 << 20
VARIANTS = ("road_1", "road_2", "road_4")


@register(
    "ROAD",
    title="RoAd",
    paper="2409.00119",
    covers=("RoAd",),
    instructions=("PairRotateOut",),
    cost="3h FLOPs, 2h elements",
)
def compile_road(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    ignore_training(files.fields)
    reason = f"it must be one of {', '.join(VARIANTS)}"
    variant = str(files.fields.choice("variant", VARIANTS, "road_1", reason))
    size = files.fields.integer("group_size", 2, MAX_GROUP, default=64)
    groups = sites_with(files, base, (THETA, ALPHA))
    ops = {group.site.path: _site_ops(group, variant, size) for group in groups}
    return with_saved(ops, files, base, Beside(bias=False))


def _site_ops(group: SiteTensors, variant: str, size: int) -> SiteOps:
    out = group.site.out_features
    if size % 2 or out % size:
        message = f"{group.site.path} has {out} out: group_size {size} must be even and divide it."
        raise AdapterRejected(message, param="group_size")
    numbers = {"road_1": out // 2, "road_2": out, "road_4": 2 * out}[variant]
    meaning = f"{variant}, {out} out"
    angles, scales = (group.take(name, (numbers,), meaning).double() for name in (THETA, ALPHA))
    first, second = (_spread(values, variant, size) for values in (angles, scales))
    cosine = second[0] * first[0].cos() - 1
    sine = second[1] * first[1].sin()
    return SiteOps(extra=(PairRotateOut(cosine.float(), sine.float(), size),))


def _spread(values: Tensor, variant: str, size: int) -> tuple[Tensor, Tensor]:
    """What each output's cosine and its sine are made of, both [out_features]."""
    if variant == "road_4":
        first, second = values.view(-1, 2, size).unbind(1)
        return first.flatten(), second.flatten()
    if variant == "road_1":
        values = values.view(-1, 1, size // 2).expand(-1, 2, -1).flatten()
    return values, values
