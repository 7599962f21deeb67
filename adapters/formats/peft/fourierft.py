"""PEFT's FOURIERFT. Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform" (2405.03003).

``y += scaling Re(ifft2(S)) x``: S holds the file's coefficients at places drawn with a seed. How many there are
(n_frequency and its pattern) the tensors say.
"""

from __future__ import annotations

import torch

from onebase.adapters.base import BaseModel
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.locations import SEEDS, Locations, take_coefficients
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.sparse import compress
from onebase.kernels.ops.spectral import FourierSparse

SPECTRUM = "fourierft_spectrum"


@register(
    "FOURIERFT",
    title="FourierFT",
    paper="2405.03003",
    covers=("FourierFT",),
    instructions=("FourierSparse",),
    cost="5h log2 h + 4n FLOPs for n coefficients, 8n bytes",
    note="coefficients are kept; the dense matrix is never formed",
)
def compile_fourierft(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    ignore_training(files.fields, "n_frequency", "n_frequency_pattern")
    seed = files.fields.integer("random_loc_seed", *SEEDS, default=777)
    scaling = files.fields.number("scaling")
    groups = sites_with(files, base, (SPECTRUM,))
    locations = Locations(seed, groups, SPECTRUM)
    ops = {group.site.path: _site_ops(group, locations, scaling) for group in groups}
    return with_saved(ops, files, base, Beside(weight=True))


def _site_ops(group: SiteTensors, locations: Locations, scaling: float) -> SiteOps:
    site = group.site
    values = take_coefficients(group, SPECTRUM).double() * (scaling / (site.in_features * site.out_features))
    rows, columns = locations.draw(site, len(values))
    mirrored = rows > site.out_features // 2  # cos is even: (r, s) and (-r, -s) are one wave
    rows = torch.where(mirrored, site.out_features - rows, rows)
    columns = torch.where(mirrored, -columns % site.in_features, columns)
    entries = compress(rows, columns, values.float(), site.out_features // 2 + 1)
    return SiteOps(extra=(FourierSparse(*entries, site.out_features),))
