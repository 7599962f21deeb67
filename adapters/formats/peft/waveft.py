"""PEFT's WAVEFT. Bilican et al., "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets" (2505.12532).

``y += scaling IDWT2(S) x``: S holds the file's coefficients at places drawn with a seed, in the middle of a matrix that
is as much larger as the transform makes it smaller. ``use_idwt`` off: S itself. How many there are (n_frequency, its
pattern, proportional_parameters) the tensors say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel
from onebase.adapters.formats.fields import Fields
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.locations import SEEDS, Locations, take_coefficients
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.formats.wavelets import WAVELETS, filters
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.sparse import Sparse, compress
from onebase.kernels.ops.spectral import WaveletSparse

SPECTRUM = "waveft_spectrum"


@dataclass(frozen=True, slots=True)
class _Settings:
    """filters: [2, length]; None where there is no transform."""

    seed: int
    scaling: float
    filters: Tensor | None


@register(
    "WAVEFT",
    title="WaveFT",
    paper="2505.12532",
    covers=("WaveFT",),
    instructions=("WaveletSparse", "Sparse"),
    cost="4Lh + 2n FLOPs for n coefficients and filters of L, 8n bytes",
    note="coefficients are kept; all wavelets that PEFT has coefficients of (db1-10, sym2-10, coif1-4)",
)
def compile_waveft(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings, groups = _read(files.fields), sites_with(files, base, (SPECTRUM,))
    locations = Locations(settings.seed, groups, SPECTRUM)
    ops = {group.site.path: _site_ops(group, settings, locations) for group in groups}
    return with_saved(ops, files, base, Beside(weight=True))


def _read(fields: Fields) -> _Settings:
    ignore_training(fields, "n_frequency", "n_frequency_pattern", "proportional_parameters")
    wavelet = fields.take("wavelet_family", "db1")
    transformed = fields.flag("use_idwt", default=True)
    if transformed:
        wavelet = fields.choice("wavelet_family", WAVELETS, wavelet, f"it must be one of {', '.join(WAVELETS)}")
    return _Settings(
        seed=fields.integer("random_loc_seed", *SEEDS, default=777),
        scaling=fields.number("scaling"),
        filters=filters(str(wavelet)) if transformed else None,
    )


def _site_ops(group: SiteTensors, settings: _Settings, locations: Locations) -> SiteOps:
    site = group.site
    values = (take_coefficients(group, SPECTRUM).double() * settings.scaling).float()
    rows, columns = locations.draw(site, len(values))
    if settings.filters is None:
        return SiteOps(extra=(Sparse(*compress(rows, columns, values, site.out_features)),))
    length = settings.filters.shape[1]
    height, width = (_padded(size, length) for size in (site.out_features, site.in_features))
    rows, columns = rows + (height - site.out_features) // 2, columns + (width - site.in_features) // 2
    entries = compress(*_bands(rows, columns, height, width), values, height)
    return SiteOps(extra=(WaveletSparse(*entries, settings.filters, site.out_features, width),))


def _padded(size: int, length: int) -> int:
    """What the transform brings back to ``size``, or to one more: an even number."""
    return (size + length - 1) // 2 * 2


def _bands(rows: Tensor, columns: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """PEFT's upper right quarter is high over rows and low over columns, its lower left the other way round: swap."""
    upper, left = rows < height // 2, columns < width // 2
    swapped = upper != left
    return (
        torch.where(swapped, (rows + height // 2) % height, rows),
        torch.where(swapped, (columns + width // 2) % width, columns),
    )
