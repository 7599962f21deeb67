"""PEFT's LOHA. Hyeon-Woo et al., "FedPara" (2108.06098).

``y += s ((W1a W1b) * (W2a W2b)) x``, s = alpha / r: an elementwise product of two matrices of rank r has rank r^2 at
most, with the rows ``W1b[i] * W2b[j]`` and the columns ``W1a[:, i] * W2a[:, j]`` as its factors.
"""

from __future__ import annotations

from torch import Tensor

from onebase.adapters.base import BaseModel
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, read_alphas, read_ranks, sites_with
from onebase.adapters.program import SiteOps

_SUFFIXES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@register(
    "LOHA",
    title="LoHa",
    paper="2108.06098",
    covers=("LoHa", "FedPara"),
    instructions=("LowRank", "Dense"),
    cost="4hr^2 FLOPs, 2hr^2 elements; dense where that is less",
)
def compile_loha(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    fields = files.fields
    ignore_training(fields, "module_dropout", "rank_dropout", "use_effective_conv2d")
    ranks, alphas, reducer = read_ranks(fields), read_alphas(fields), Reducer()
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, _SUFFIXES):
        path = tensors.site.path
        rank = ranks.at(path)
        ops[path] = _site_ops(tensors, rank, alphas.at(path) / rank, reducer)
    return with_saved(ops, files, base, Beside(weight=True))


def _site_ops(tensors: SiteTensors, rank: int, scale: float, reducer: Reducer) -> SiteOps:
    site = tensors.site
    meaning = f"rank {rank} by r and rank_pattern, {site.in_features} in, {site.out_features} out"
    out1, out2 = (tensors.take(f"hada_w{i}_a", (site.out_features, rank), meaning) for i in (1, 2))
    in1, in2 = (tensors.take(f"hada_w{i}_b", (rank, site.in_features), meaning) for i in (1, 2))
    if rank**2 * (site.in_features + site.out_features) >= site.in_features * site.out_features:
        reducer.spend(site.path, site.in_features * site.out_features)
        return reducer.dense(site, (out1 @ in1) * (out2 @ in2) * scale)
    return reducer.product(site, _pairs(in1, in2), _pairs(out1.T, out2.T), scale)


def _pairs(one: Tensor, two: Tensor) -> Tensor:
    """[rank, n], [rank, n] -> [rank^2, n]: every product of a row of the one and a row of the other."""
    return (one[:, None] * two[None]).flatten(0, 1)
