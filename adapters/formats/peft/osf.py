"""PEFT's OSF. Nayak et al., "Sculpting subspaces" (2504.07097).

W's largest singular triples stay, the others are trained: ``delta W = U S V - U0 S0 V0``, where the second part is W
less its largest triples. The product does not depend on the signs of singular vectors. The tensors say how many triples
are trained; the rank is twice as many, so that a small ``effective_rank`` ends up dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.derived import base_weight
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import with_saved
from onebase.adapters.formats.spectral_basis import full_svd
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps

U, S, V = (f"osf_svd_params.{name}_low" for name in "USV")
# effective_rank and rank_pattern (patterns of a stranger) only say again what the tensors' shapes say.
_HARMLESS = ("effective_rank", "rank_pattern", "target_svd_config")


@register(
    "OSF",
    title="OSF",
    paper="2504.07097",
    instructions=("LowRank", "Dense"),
    cost="8ht FLOPs, 4ht elements for t trained triples; at most 2h^2, h^2",
    note="decomposes the base's weight at load",
)
def compile_osf(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    ignore_training(files.fields, *_HARMLESS)
    reducer = Reducer()
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, (U, S, V)):
        u, s, v = _take(tensors)
        if not len(s):
            continue  # effective_rank covers the module's smaller width
        left, values, right = full_svd(base_weight(base, tensors.site))
        last = slice(len(values) - len(s), None)
        a = torch.cat([v, right[last]])
        b = torch.cat([(u * s).T, -(left[:, last] * values[last]).T])
        ops[tensors.site.path] = reducer.product(tensors.site, a, b)
    return with_saved(ops, files, base)


def _take(tensors: SiteTensors) -> tuple[Tensor, Tensor, Tensor]:
    """U [out_features, t], S [t], V [t, in_features] of the t trained triples. PEFT keeps at least one untrained."""
    site, shape = tensors.site, tensors.shape(S)
    most = min(site.in_features, site.out_features) - 1
    if len(shape) != 1 or not shape[0] <= most:
        key = tensors.key(S)
        raise AdapterRejected(f"The tensor {key!r} has shape {shape}; at most {most} values can be trained.", param=key)
    u = tensors.take(U, (site.out_features, *shape), f"out_features, and the length of {S!r}")
    v = tensors.take(V, (*shape, site.in_features), f"the length of {S!r}, and in_features")
    return u, tensors.take(S, shape, "its own"), v
