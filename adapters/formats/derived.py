"""For families whose operations are derived from the base's weight at load: the weight, and what comes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.errors import AdapterRejected


def base_weight(base: BaseModel, site: Site) -> Tensor:
    """[out_features, in_features], float32 on the host, whatever the base runs in."""
    return base.weight(site.path).detach().to("cpu", torch.float32)


def finite(value: Tensor, site: Site, reason: str) -> Tensor:
    """The tensor, if what was computed from the file is finite. Raises AdapterRejected."""
    if not bool(torch.isfinite(value).all()):
        raise AdapterRejected(f"{site.path}: {reason}.", param=site.path)
    return value
