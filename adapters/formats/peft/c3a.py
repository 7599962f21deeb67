"""PEFT's C3A. Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution" (2407.19342).

``y += C x / in_features`` with C block-circulant. The kernels' shape says the block size.
"""

from __future__ import annotations

from onebase.adapters.base import BaseModel
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.circulant import BlockCirculant

KERNEL = "c3a_kernel"


@register(
    "C3A",
    title="C3A",
    paper="2407.19342",
    covers=("C3A",),
    instructions=("BlockCirculant",),
    cost="10h log2 k + 4h^2/k FLOPs for blocks of k, h^2/k elements in float32",
)
def compile_c3a(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    ignore_training(files.fields, "block_size", "block_size_pattern")
    ops = {group.site.path: _site_ops(group) for group in sites_with(files, base, (KERNEL,))}
    return with_saved(ops, files, base, Beside(weight=True))


def _site_ops(group: SiteTensors) -> SiteOps:
    site, shape = group.site, group.shape(KERNEL)
    size = shape[-1] if shape else 0
    if size < 1 or site.in_features % size or site.out_features % size:
        message = f"{site.path} has {site.in_features} in and {site.out_features} out: blocks of {size} do not fit."
        raise AdapterRejected(message, param=group.key(KERNEL))
    blocks = (site.out_features // size, site.in_features // size, size)
    kernel = group.take(KERNEL, blocks, f"blocks of {size}, {site.in_features} in, {site.out_features} out")
    return SiteOps(extra=(BlockCirculant.of(kernel / site.in_features),))
