"""PEFT's SHIRA. Bhardwaj et al., "Sparse High Rank Adapters" (2406.13175).

``y += S x`` with r (in_features + out_features) entries, at places that the file has.
"""

from __future__ import annotations

from onebase.adapters.base import BaseModel
from onebase.adapters.formats.entries import sparse, take_indices
from onebase.adapters.formats.fields import MAX_RANK
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps

WEIGHT, INDICES = "shira_weight", "shira_indices"


@register(
    "SHIRA",
    title="SHiRA",
    paper="2406.13175",
    covers=("SHiRA",),
    instructions=("Sparse",),
    cost="2n FLOPs for n entries, 6n bytes",
)
def compile_shira(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    ignore_training(files.fields, "mask_type", "random_seed")
    r = files.fields.integer("r", 1, MAX_RANK)
    ops = {group.site.path: _site_ops(group, r) for group in sites_with(files, base, (WEIGHT, INDICES))}
    return with_saved(ops, files, base, Beside(weight=True))


def _site_ops(group: SiteTensors, r: int) -> SiteOps:
    site = group.site
    count = r * (site.in_features + site.out_features)
    meaning = f"r {r}, {site.in_features} in, {site.out_features} out"
    bounds = (site.out_features, site.in_features)
    rows, columns = take_indices(group.key(INDICES), group.bag, (2, count), bounds, meaning)
    return SiteOps(extra=(sparse(site, rows, columns, group.take(WEIGHT, (count,), meaning)),))
