"""AdapterHub's LoRA (2106.09685), (IA)3 (2205.05638) and VeRA (2310.11454): all under the architecture ``lora``.

LoRA adds alpha/r B A x; (IA)3 multiplies the output, bias included, by alpha l, at down_proj too; VeRA keeps whole
matrices: alpha/r (E B) (D A) x with A and B common to its modules. GPT-2's fused projection has one block of B and A
for each of q, k and v that is adapted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import MAX_RANK, Fields, refused
from onebase.adapters.formats.hub.keys import Group, HubFile
from onebase.adapters.program import LowRank, SiteOps
from onebase.kernels.ops.vector import ScaleOut

_HARMLESS = (
    "dropout",
    "dtype",
    "init_weights",
    "init_weights_seed",
    "intermediate_lora",  # which modules: those that have tensors
    "leave_out",
    "output_lora",
    "selfattn_lora",
)
_GATING = "a gate that averages over the whole sequence depends on tokens that are yet to come (UniPELT)"
_FUSED = ("c_attn",)


@dataclass(frozen=True, slots=True)
class HubLoraSettings:
    """matrices: which of q, k, v have a block where they are fused, in that order."""

    r: int
    alpha: float
    scales: bool
    vera: bool
    matrices: tuple[bool, bool, bool]


def read_lora(fields: Fields, *, alpha_is_r: bool) -> HubLoraSettings:
    """alpha_is_r: versions below 1.1.0 trained without alpha, whatever the config says."""
    fields.ignore(_HARMLESS)
    fields.must_be_unset({"use_gating": _GATING})
    mode = fields.choice("composition_mode", ("add", "scale"), "add", "'add' and 'scale' are served")
    r, alpha = fields.integer("r", 1, MAX_RANK), fields.number("alpha")
    vera = [isinstance(fields.take(name), float) for name in ("vera_d", "vera_b")]
    if mode == "scale" and (r != 1 or any(vera)):
        raise refused("composition_mode", mode, "it goes with r 1 and without vera_d and vera_b")
    return HubLoraSettings(r, float(r) if alpha_is_r else alpha, mode == "scale", any(vera), _matrices(fields))


def _matrices(fields: Fields) -> tuple[bool, bool, bool]:
    value = fields.take("attn_matrices", ["q", "v"])
    if not isinstance(value, list) or not all(item in ("q", "k", "v") for item in value):
        raise refused("attn_matrices", value, "it must be a list of 'q', 'k' and 'v'")
    return "q" in value, "k" in value, "v" in value


def compile_lora(file: HubFile, settings: HubLoraSettings) -> dict[str, SiteOps]:
    """Raises AdapterRejected naming the key."""
    ops: dict[str, SiteOps] = {}
    for module, group in file.groups("loras").items():
        key = next(iter(group.values()))
        site = file.site_of(key, module)
        if site.kind is not SiteKind.LINEAR:
            raise AdapterRejected(f"The tensor {key!r} adapts {site.path}, which is no linear module.", param=key)
        if site.path in ops:
            raise AdapterRejected(f"The tensor {key!r} adapts {site.path}, and others do so too.", param=key)
        fused = site.path.rpartition(".")[2] in _FUSED
        if settings.scales:
            ops[site.path] = _scaled(file, group, settings, site, fused)
        elif settings.vera:
            ops[site.path] = _vera(file, group, settings, site, fused)
        else:
            ops[site.path] = _low_rank(file, group, settings, site, fused)
    return ops


def _low_rank(file: HubFile, group: Group, settings: HubLoraSettings, site: Site, fused: bool) -> SiteOps:
    count = sum(settings.matrices) if fused else 1
    part = site.out_features // 3 if fused else site.out_features
    a = file.take(group, "lora_A", (settings.r * count, site.in_features), site.path)
    b = file.take(group, "lora_B", (part * count, settings.r), site.path)
    if fused:
        b = _spread(b.view(count, part, settings.r), settings.matrices)
    return SiteOps(low_rank=LowRank(a, b.T.contiguous(), settings.alpha / settings.r))


def _spread(blocks: Tensor, matrices: tuple[bool, bool, bool]) -> Tensor:
    """Blocks [count, out / 3, r], each over the rank of its own, to [out, count * r]."""
    count, part, r = blocks.shape
    spread = blocks.new_zeros(3, part, count, r)
    for block, matrix in enumerate(at for at in range(3) if matrices[at]):
        spread[matrix, :, block] = blocks[block]
    return spread.view(3 * part, count * r)


def _scaled(file: HubFile, group: Group, settings: HubLoraSettings, site: Site, fused: bool) -> SiteOps:
    """The library multiplies by alpha l, and by alpha alone where a fused projection has no l."""
    factor = torch.ones(site.out_features)
    if fused:
        chosen = torch.tensor(settings.matrices)[:, None].expand(3, site.out_features // 3).reshape(-1)
    else:
        chosen = torch.ones(site.out_features, dtype=torch.bool)
    factor[chosen] = file.take(group, "lora_B", (int(chosen.sum()), 1), site.path)[:, 0]
    return SiteOps(extra=(ScaleOut(factor * settings.alpha - 1),))


def _vera(file: HubFile, group: Group, settings: HubLoraSettings, site: Site, fused: bool) -> SiteOps:
    if fused:
        raise refused("vera_d", None, f"the library itself has no VeRA on a fused projection ({site.path})")
    r, where = settings.r, site.path
    outer = file.take(group, "vera_B", (site.out_features, site.out_features), where)
    inner = file.take(group, "vera_D", (r, r), where)
    a = inner @ file.take_shared("lora_A", (r, site.in_features), where)
    b = outer @ file.take_shared("lora_B", (site.out_features, r), where)
    return SiteOps(low_rank=LowRank(a, b.T.contiguous(), settings.alpha / r))
