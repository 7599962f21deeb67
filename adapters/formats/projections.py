"""Random matrices that PEFT's shared-projection families may leave out of the file: drawn again from their seed.

PEFT draws on the CPU, from a generator of its own, at the largest dimensions among the targeted modules; the same
calls in the same order give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import Fields, refused
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.targets import SiteTensors, global_key, take_global
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.shared import SharedLowRank

MAX_SEED = (1 << 63) - 1


def largest(sites: Sequence[SiteTensors]) -> tuple[int, int]:
    """The largest in_features and out_features, each by itself."""
    return max(s.site.in_features for s in sites), max(s.site.out_features for s in sites)


def read_seed(fields: Fields, name: str, default: int) -> int:
    """The field may be absent, but not null: numpy draws anew in every run without a seed."""
    value = fields.take(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SEED:
        raise refused(name, value, f"it must be an integer from 0 to {MAX_SEED}")
    return value


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


def refuse_saved(files: AdapterFiles, *names: str) -> None:
    """PEFT draws the projections when the config says that they were not saved, whatever the file holds."""
    for name in names:
        if key := global_key(files.tensors, name):
            raise AdapterRejected(
                f"save_projection is false, and yet the file has {key!r}. Set it to true to use it.",
                param="save_projection",
            )


def shared_low_rank(sites: Sequence[SiteTensors], a: Tensor, b: Tensor, prefix: str, mids: int) -> dict[str, SiteOps]:
    """Vectors of each site over one pair of matrices.

    a: [rank, largest in_features]; b: [largest out_features, rank]; a site uses the left part of the one and the top
    of the other. The vectors are ``<prefix>_lambda_d`` [mids], of which the first rank count, and
    ``<prefix>_lambda_b`` [out_features]. Sites of equal size get the same tensor objects.
    """
    rank = len(a)
    downs = {n: a[:, :n].contiguous() for n in {s.site.in_features for s in sites}}
    ups = {n: b[:n].T.contiguous() for n in {s.site.out_features for s in sites}}
    ops: dict[str, SiteOps] = {}
    for tensors in sites:
        site = tensors.site
        mid = tensors.take(f"{prefix}_lambda_d", (mids,), f"r is {rank}")[:rank]
        out = tensors.take(f"{prefix}_lambda_b", (site.out_features,), "out_features")
        instruction = SharedLowRank(downs[site.in_features], ups[site.out_features], mid.contiguous(), out)
        ops[site.path] = SiteOps(extra=(instruction,))
    return ops


def projections(
    files: AdapterFiles, sites: Sequence[SiteTensors], prefix: str, rows: int, rank: int, seed: int, *, saved: bool
) -> tuple[Tensor, Tensor]:
    """A [rows, largest in_features] and B [largest out_features, rank], from the file or from the seed."""
    width, out = largest(sites)
    names = f"{prefix}_A", f"{prefix}_B"
    shapes = (rows, width), (out, rank)
    if saved:
        meaning = f"r is {rank}, at most {width} in and {out} out"
        a, b = (take_global(files.tensors, name, shape, meaning) for name, shape in zip(names, shapes, strict=True))
        return a, b
    refuse_saved(files, *names)
    Reducer().spend(names[0], rows * width + rank * out)
    generator = seeded(seed)
    a, b = (torch.nn.init.kaiming_uniform_(torch.empty(shape), generator=generator) for shape in shapes)
    return a, b
