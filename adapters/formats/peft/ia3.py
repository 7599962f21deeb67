"""PEFT's IA3. Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper" (2205.05638).

A vector multiplies a feed-forward module's input, or another module's output, bias included. Which of the two a file
means, its tensor says: [1, in_features] or [out_features, 1].
"""

from __future__ import annotations

from onebase.adapters.base import BaseModel
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.vector import ScaleIn, ScaleOut

L = "ia3_l"


@register(
    "IA3",
    title="(IA)3",
    paper="2205.05638",
    covers=("(IA)3",),
    instructions=("ScaleIn", "ScaleOut"),
    cost="h FLOPs, h elements",
)
def compile_ia3(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    ignore_training(files.fields, "feedforward_modules", "init_ia3_weights")
    ops = {group.site.path: _site_ops(group) for group in sites_with(files, base, (L,))}
    return with_saved(ops, files, base, Beside(bias=False))


def _site_ops(group: SiteTensors) -> SiteOps:
    site = group.site
    meaning = f"{site.out_features} out; (1, {site.in_features}) for a feed-forward module"
    if group.shape(L)[:1] == (1,) and site.out_features != 1:
        return SiteOps(extra=(ScaleIn(group.take(L, (1, site.in_features), meaning).flatten() - 1),))
    return SiteOps(extra=(ScaleOut(group.take(L, (site.out_features, 1), meaning).flatten() - 1),))
