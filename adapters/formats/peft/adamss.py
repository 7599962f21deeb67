"""PEFT's ADAMSS. Zheng et al., "AdaMSS" (NeurIPS 2025).

The outputs are split into clusters, and each gets a low rank of its own within the span of W's singular vectors:
``y[cluster i] += B_i A_i V [x; 1]``, where V, ``adamss_newB``, is in the file and the 1 is there where the base has a
bias. Together they are one low rank: the rows of A_i V below each other, and each B_i scattered to its cluster's rows.

Which output is in which cluster is not in the file. PEFT clusters anew whenever it loads: the rows of U, from a seeded
decomposition of [W, b], by scikit-learn's k-means. The same is done here, and held against what the file does tell: the
span of V, and the size of each cluster. (Distances between rows of U do not depend on the basis of the span.)
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.derived import base_weight
from onebase.adapters.formats.fields import MAX_RANK, Fields
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.spectral_basis import seeded_svd
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with
from onebase.adapters.program import SiteOps

PROJECTION = "adamss_newB"
MAX_SUBSPACES = 128
_CLUSTER_SEED, _CLUSTER_STEPS, _POWER_STEPS = 123456789, 10, 2  # PEFT's
_SAME = 0.998  # of each row of V in the span of what is computed here; bfloat16 files come to 0.99999
# Ranks of the subspaces stand in the tensors' shapes.
_HARMLESS = (
    "asa_importance_beta",
    "asa_schedule_exponent",
    "asa_target_subspaces",
    "asa_uncertainty_beta",
    "final_warmup",
    "init_warmup",
    "mask_interval",
    "subspace_rank",
    "svd_threshold",
    "use_asa",
    "use_dynamic_rank",
)


@dataclass(frozen=True, slots=True)
class _Settings:
    r: int
    subspaces: int
    seed: int


@register(
    "ADAMSS",
    title="AdaMSS",
    paper="openreview 8ZdWmpYxT0",
    instructions=("LowRank", "AddOut"),
    cost="4hr FLOPs, 2hr elements, r the subspaces' ranks together",
    note=(
        "needs scikit-learn (onebase[adamss]): its files lack the clusters, which are computed again from the base's "
        "weight, and refused unless they fit the file"
    ),
)
def compile_adamss(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings = _read(files.fields)
    names = [f"adamss_{side}.{i}" for side in "AB" for i in range(settings.subspaces)]
    reducer = Reducer()
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, (PROJECTION, *names)):
        site = tensors.site
        whole = _with_bias(site, base)
        projection = _projection(tensors, whole, settings)
        clusters = _clusters(tensors, whole, projection, settings, base)
        a, b = _factors(tensors, projection, clusters, reducer)
        bias = (a[:, -1] @ b) if whole.shape[1] > site.in_features else None
        op = reducer.product(site, a[:, : site.in_features], b)
        ops[site.path] = SiteOps(low_rank=op.low_rank, add_out=bias, extra=op.extra)
    return with_saved(ops, files, base, Beside(bias=False))


def _read(fields: Fields) -> _Settings:
    ignore_training(fields, *_HARMLESS)
    return _Settings(
        r=fields.integer("r", 1, MAX_RANK),
        subspaces=fields.integer("num_subspaces", 1, MAX_SUBSPACES),
        seed=fields.integer("random_seed", 0, (1 << 63) - 1, default=0),
    )


def _with_bias(site: Site, base: BaseModel) -> Tensor:
    """[W, b], [out_features, in_features + 1]; W alone where the base has no bias."""
    weight, bias = base_weight(base, site), base.bias(site.path)
    return weight if bias is None else torch.cat([weight, bias.detach().to("cpu", torch.float32)[:, None]], 1)


def _projection(tensors: SiteTensors, whole: Tensor, settings: _Settings) -> Tensor:
    rank = min(settings.r, *whole.shape)
    return tensors.take(PROJECTION, (rank, whole.shape[1]), "r, and the base's inputs with one for its bias")


def _clusters(
    tensors: SiteTensors, whole: Tensor, projection: Tensor, settings: _Settings, base: BaseModel
) -> list[Tensor]:
    """The output features of each cluster, ascending, int64."""
    site = tensors.site
    device = base.weight(site.path).device
    u, _, vt = seeded_svd(whole.to(device), len(projection), iterations=_POWER_STEPS, seed=settings.seed)
    _check_span(vt.cpu(), projection, tensors)
    count = min(settings.subspaces, site.out_features)
    labels = torch.from_numpy(_k_means(count).fit_predict(u.cpu().numpy())).long()
    return [(labels == i).nonzero().flatten() for i in range(count)]


def _check_span(computed: Tensor, projection: Tensor, tensors: SiteTensors) -> None:
    """Both [rank, columns]; the rows of ``computed`` are orthonormal."""
    if not float((projection @ computed.T).norm(dim=1).min()) >= _SAME:
        raise AdapterRejected(
            f"{tensors.site.path}: {PROJECTION} is not what this base's weight gives here, so the clusters cannot be "
            "computed again: the adapter belongs to another base, or was made on another kind of device.",
            param=PROJECTION,
        )


def _k_means(count: int) -> Any:
    try:
        cluster = importlib.import_module("sklearn.cluster")
    except ImportError:
        raise AdapterRejected(
            "ADAMSS adapters need scikit-learn on the server (pip install 'onebase[adamss]'): PEFT saves no clusters.",
            param="peft_type",
        ) from None
    return cluster.KMeans(count, init="random", n_init=1, max_iter=_CLUSTER_STEPS, random_state=_CLUSTER_SEED)


def _factors(
    tensors: SiteTensors, projection: Tensor, clusters: list[Tensor], reducer: Reducer
) -> tuple[Tensor, Tensor]:
    """a: [sum of ranks, columns of the projection]; b: [sum of ranks, out_features]."""
    site, rows = tensors.site, []
    scattered = []
    for i, cluster in enumerate(clusters):
        shape = tensors.shape(f"adamss_A.{i}")
        rank = shape[0] if shape else 0
        reducer.spend(site.path, rank * (site.in_features + site.out_features))
        a = tensors.take(f"adamss_A.{i}", (rank, len(projection)), "a subspace's rank, and r")
        b = tensors.take(f"adamss_B.{i}", (len(cluster), rank), "the size of the cluster found in the base's weight")
        wide = torch.zeros(rank, site.out_features)
        wide[:, cluster] = b.T
        rows.append(a @ projection)
        scattered.append(wide)
    return torch.cat(rows), torch.cat(scattered)
