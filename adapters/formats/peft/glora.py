"""PEFT's GLORA. Chavan et al., "One-for-All: Generalized LoRA" (2306.07967).

``W' = W + W * A + B`` and, at modules with a bias, ``b' = b + b * D + E + W C``. A and B are products of low rank
(config_A_B = lora: dense at load), one number a row (vector), one number (constant), or absent; so are C, D and E.
A vector or constant A scales the output before its bias, and such a B is of rank one: every input counts alike.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from onebase.adapters.program import LowRank, SiteOps
from onebase.kernels.ops.vector import ScaleOut

_PARTS = ("A", "B", "C", "D", "E")
_ENDS = ("X", "Xd", "Xu", "zeros")
_REASON = "{} are served"


@dataclass(frozen=True, slots=True)
class GloraKinds:
    """How each part is parameterised: lora, vector, constant or none."""

    rank: int
    weight: str
    vector: str
    bias: str

    def of(self, part: str, *, has_bias: bool) -> str:
        if part in "AB":
            return self.weight
        return (self.vector if part == "C" else self.bias) if has_bias else "none"


@register(
    "GLORA",
    title="GLoRA",
    paper="2306.07967",
    covers=("GLoRA",),
    instructions=("Dense", "ScaleOut", "LowRank", "AddOut"),
    cost="2h^2 FLOPs, h^2 elements (config_A_B lora); 5h FLOPs, 4h elements (vector, constant)",
    note="every kind of A to E",
)
def compile_glora(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    kinds, reducer = _read(files), Reducer()
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, [f"glora_{part}.{end}" for part in _PARTS for end in _ENDS]):
        site_ops = _site_ops(tensors, kinds, base, reducer)
        if any(True for _ in site_ops.tensors()):
            ops[tensors.site.path] = site_ops
    return with_saved(ops, files, base, Beside(bias=False))


def _read(files: AdapterFiles) -> GloraKinds:
    fields = files.fields
    ignore_training(fields)
    kinds = []
    for name, allowed in (
        ("config_A_B", ("lora", "vector", "constant", "none")),
        ("config_C", ("lora", "vector", "none")),
        ("config_D_E", ("vector", "constant", "none")),
    ):
        kinds.append(str(fields.choice(name, allowed, None, _REASON.format(", ".join(allowed)))))
    return GloraKinds(fields.integer("r", 1, MAX_RANK), *kinds)


def _site_ops(tensors: SiteTensors, kinds: GloraKinds, base: BaseModel, reducer: Reducer) -> SiteOps:
    path = tensors.site.path
    bias = base.bias(path)
    bias = None if bias is None else bias.float().cpu()
    a, b, c, d, e = (_part(tensors, part, kinds, bias is not None, reducer) for part in _PARTS)
    add = torch.zeros(tensors.site.out_features)
    if bias is not None:
        add = bias * _or_zero(d) + _or_zero(e)
        add = add if c is None else add + base.weight(path).float().cpu() @ c[:, 0]
        add = add.expand(tensors.site.out_features)
    if a is None or b is None:
        return SiteOps(add_out=add if bool(add.any()) else None)
    if kinds.weight == "lora":
        delta = base.weight(path).float().cpu() * a + b
        return SiteOps(add_out=add, extra=reducer.dense(tensors.site, delta).extra)
    return _rank_one(tensors, a, b, add if bias is None else add - a * bias)


def _rank_one(tensors: SiteTensors, a: Tensor, b: Tensor, add: Tensor) -> SiteOps:
    """a, b: [out_features]. The scale acts on the output with its bias, which ``add`` takes out again."""
    low_rank = LowRank(torch.ones(1, tensors.site.in_features), b[None].contiguous(), 1.0)
    return SiteOps(low_rank=low_rank, add_out=add, extra=(ScaleOut(a.contiguous()),))


def _or_zero(tensor: Tensor | None) -> Tensor:
    return torch.zeros(1) if tensor is None else tensor


def _part(tensors: SiteTensors, part: str, kinds: GloraKinds, has_bias: bool, reducer: Reducer) -> Tensor | None:
    """A, B: [out, in] (lora) or [out]; C: [in, 1]; D, E: [out] or [1]. None where the part is absent."""
    site = tensors.site
    rows, columns = (site.in_features, 1) if part == "C" else (site.out_features, site.in_features)
    kind, name, meaning = (
        kinds.of(part, has_bias=has_bias),
        f"glora_{part}",
        f"r is {kinds.rank}, config_* say the kind",
    )
    if kind == "none":
        shape = {"A": (rows, columns), "B": (rows, columns), "C": (rows, 1)}.get(part, (rows,))
        _refuse_values(tensors, f"{name}.zeros", shape)
        return None
    if kind == "lora":
        reducer.spend(site.path, rows * columns)
        down, up = ((f"{name}.Xd", (rows, kinds.rank)), (f"{name}.Xu", (kinds.rank, columns)))
        return tensors.take(*down, meaning) @ tensors.take(*up, meaning)
    shape = (1,) if kind == "constant" else (rows,) if part in "DE" else (rows, 1)
    values = tensors.take(f"{name}.X", shape, meaning)
    return values if part == "C" else values.flatten().expand(rows)


def _refuse_values(tensors: SiteTensors, suffix: str, shape: tuple[int, ...]) -> None:
    """PEFT writes zeros for an absent part, and reads back whatever the file has there."""
    if suffix in tensors and bool(tensors.take(suffix, shape, "zeros for an absent part").any()):
        key = tensors.key(suffix)
        raise AdapterRejected(f"The tensor {key!r} stands for an absent part, and is not zero.", param=key)
