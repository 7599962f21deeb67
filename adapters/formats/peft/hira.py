"""PEFT's HIRA. Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation" (ICLR 2025).

``y += (W * (B A)) x``, elementwise with the base's weight: of full rank, so dense at load. At an embedding
``y += E[t] * (B A[:, t])``, where E is without the scale that some embeddings put on their rows.
"""

from __future__ import annotations

from onebase.adapters.base import BaseModel, SiteKind
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import with_saved
from onebase.adapters.formats.targets import Ranks, SiteTensors, ignore_training, read_ranks, sites_with
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.modulated import ModulatedRows

_A, _B = "hira_A", "hira_B"
_TOKEN_A, _TOKEN_B = "hira_embedding_A", "hira_embedding_B"


@register(
    "HIRA",
    title="HiRA",
    paper="openreview TwJrTz9cRS",
    covers=("HiRA",),
    instructions=("Dense", "ModulatedRows"),
    cost="2h^2 FLOPs, h^2 elements",
    note="full rank, made at load from the base's weight; embeddings keep their factors",
)
def compile_hira(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    ignore_training(files.fields, "hira_dropout")
    ranks, reducer = read_ranks(files.fields), Reducer()
    sites = sites_with(files, base, (_A, _B, _TOKEN_A, _TOKEN_B), (SiteKind.LINEAR, SiteKind.EMBEDDING))
    return with_saved({s.site.path: _site_ops(s, ranks, base, reducer) for s in sites}, files, base)


def _site_ops(tensors: SiteTensors, ranks: Ranks, base: BaseModel, reducer: Reducer) -> SiteOps:
    """No scale depends on the rank. PEFT minds rank_pattern for an adapter that joins another one, and else takes r."""
    site = tensors.site
    embedding, rank = site.kind is SiteKind.EMBEDDING, ranks.at(site.path)
    suffix_a, suffix_b = (_TOKEN_A, _TOKEN_B) if embedding else (_A, _B)
    if tensors.shape(suffix_a)[:1] == (ranks.r,):
        rank = ranks.r
    meaning = f"rank {rank} by r and rank_pattern, {site.in_features} in, {site.out_features} out"
    a = tensors.take(suffix_a, (rank, site.in_features), meaning)
    b = tensors.take(suffix_b, (site.out_features, rank), meaning)
    if embedding:
        return SiteOps(extra=(ModulatedRows(a.T.contiguous(), b.T.contiguous(), 1 / site.output_scale),))
    reducer.spend(site.path, site.in_features * site.out_features)
    return reducer.dense(site, base.weight(site.path).float().cpu() * (b @ a))
