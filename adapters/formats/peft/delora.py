"""PEFT's DELORA. Bini et al., "DeLoRA" (2503.18225).

``y += B diag(lambda / (r |A_i| |B_i|)) A (w_norm * x)``: normalised components of one common strength; w_norm, which
the file holds, is the norm of the base's columns.
"""

from __future__ import annotations

from onebase.adapters.base import BaseModel
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, read_ranks, sites_with
from onebase.adapters.program import SiteOps

_SUFFIXES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_LEAST_NORM = 1e-4


@register(
    "DELORA",
    title="DeLoRA",
    paper="2503.18225",
    covers=("DeLoRA",),
    instructions=("LowRank",),
    cost="4hr FLOPs, 2hr elements",
)
def compile_delora(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    # delora_lambda and its pattern are where training starts from: the tensors hold what it became
    ignore_training(files.fields, "delora_lambda", "lambda_pattern", "module_dropout")
    ranks, reducer = read_ranks(files.fields), Reducer()
    sites = sites_with(files, base, _SUFFIXES)
    ops = {s.site.path: _site_ops(s, ranks.at(s.site.path), reducer) for s in sites}
    return with_saved(ops, files, base, Beside(weight=True))


def _site_ops(tensors: SiteTensors, rank: int, reducer: Reducer) -> SiteOps:
    site = tensors.site
    meaning = f"rank {rank} by r and rank_pattern, {site.in_features} in, {site.out_features} out"
    a = tensors.take("delora_A", (rank, site.in_features), meaning)
    b = tensors.take("delora_B", (site.out_features, rank), meaning).T
    strength = tensors.take("delora_lambda", (1,), "one number")
    norms = a.norm(dim=1).clamp(min=_LEAST_NORM) * b.norm(dim=1).clamp(min=_LEAST_NORM)
    a = a * tensors.take("delora_w_norm", (site.in_features,), "in_features")
    return reducer.product(site, a, b * (strength / rank / norms)[:, None])
