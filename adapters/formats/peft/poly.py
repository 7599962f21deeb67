"""PEFT's POLY. Ponti et al., "Polytropon" (2202.13914); Caccia et al., "Multi-Head Adapter Routing" (2211.03831).

A few low-rank skills, mixed by weights of a task: ``sigmoid(logits) / sum``, for each of n_splits parts of the input
and of the output. For one task the mixture is one low-rank delta of scale 1 / r. Served is the task 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import MAX_RANK
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
_MAX_COUNT = 1 << 16
_LEAST_SUM = 1e-12
TASK = 0


@register(
    "POLY",
    title="Polytropon (Poly, MHR)",
    paper="2202.13914",
    covers=("Poly", "MHR"),
    instructions=("LowRank",),
    cost="4hr FLOPs, 2hr elements",
    note="the mixture of the task 0, made at load",
)
def compile_poly(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    fields = files.fields
    ignore_training(fields)
    fields.choice("poly_type", ("poly",), "poly", "only 'poly' is served")
    rank = fields.integer("r", 1, MAX_RANK)
    tasks, skills, splits = (fields.integer(name, 1, _MAX_COUNT) for name in ("n_tasks", "n_skills", "n_splits"))
    reducer = Reducer()
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, (_A, _B, _LOGITS)):
        mixture = _mixture(tensors, tasks, skills, splits)
        a, b = _skills(tensors, rank, skills, splits)
        down = torch.einsum("qs,qsdr->rqd", mixture, a).flatten(1)
        up = torch.einsum("qs,qsrd->rqd", mixture, b).flatten(1)
        ops[tensors.site.path] = reducer.product(tensors.site, down, up, 1 / rank)
    return with_saved(ops, files, base, Beside(weight=True))


def _mixture(tensors: SiteTensors, tasks: int, skills: int, splits: int) -> Tensor:
    """[n_splits, n_skills]: rows that sum to one."""
    meaning = f"n_tasks is {tasks}, n_splits * n_skills is {splits * skills}"
    logits = tensors.take(_LOGITS, (tasks, splits * skills), meaning)[TASK].view(splits, skills)
    weights = torch.sigmoid(logits)
    return weights / (weights.sum(dim=-1, keepdim=True) + _LEAST_SUM)


def _skills(tensors: SiteTensors, rank: int, skills: int, splits: int) -> tuple[Tensor, Tensor]:
    site = tensors.site
    width, out = site.in_features // splits, site.out_features // splits
    if (width * splits, out * splits) != (site.in_features, site.out_features):
        message = (
            f"n_splits is {splits}, which does not divide {site.path} ({site.in_features} in, {site.out_features} out)."
        )
        raise AdapterRejected(message, param="n_splits")
    meaning = f"r is {rank}, n_skills is {skills}, n_splits is {splits}"
    a = tensors.take(_A, (splits, skills, width, rank), meaning)
    return a, tensors.take(_B, (splits, skills, rank, out), meaning)
