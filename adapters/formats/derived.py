"""What families of linear sites have in common whose operations are derived from the base's weight at load.

Weights are read in float32 on the host, whatever the base runs in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import Fields
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.keys import group_by_site
from onebase.adapters.formats.targets import SiteTensors

# Tensors tell which modules are adapted; how training started, and how the base stores its weight, changes nothing.
_HARMLESS = (
    "exclude_modules",
    "fan_in_fan_out",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "target_modules",
)


def ignore_training(fields: Fields, *harmless: str) -> None:
    """Take the fields that change nothing at inference; ``harmless``: those of one family."""
    fields.ignore((*_HARMLESS, *harmless))


def linear_sites(files: AdapterFiles, base: BaseModel, suffixes: Collection[str]) -> Iterator[SiteTensors]:
    """Every site that has any of the suffixes. Raises AdapterRejected where one is not linear."""
    for path, keys in group_by_site(files.tensors, base, suffixes).items():
        site = base.sites[path]
        if site.kind is not SiteKind.LINEAR:
            key = next(iter(keys.values()))
            message = f"The tensor {key!r} adapts a {site.kind} of the base; this family adapts linear modules."
            raise AdapterRejected(message, param=key)
        yield SiteTensors(site, keys, files.tensors)


def base_weight(base: BaseModel, site: Site) -> Tensor:
    """[out_features, in_features], float32 on the host."""
    return base.weight(site.path).detach().to("cpu", torch.float32)


def finite(value: Tensor, site: Site, reason: str) -> Tensor:
    """The tensor, if what was computed from the file is finite. Raises AdapterRejected."""
    if not bool(torch.isfinite(value).all()):
        raise AdapterRejected(f"{site.path}: {reason}.", param=site.path)
    return value
