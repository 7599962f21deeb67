"""PEFT's LORA. Hu et al., "LoRA" (2106.09685); Kalajdzievski, "rank stabilization" (2312.03732).

At a linear site ``y += s (B A x + bias)``, at an embedding ``y += s B A[:, token]``, with s = alpha / r, or
alpha / sqrt(r) for rsLoRA; rank_pattern and alpha_pattern give r and alpha by module. An embedding module that scales
what it looks up (Gemma's) scales the adapter's part too: s includes the site's output_scale.
Targets are the modules that have tensors: target_modules and its relatives say nothing more.

DoRA is ``y = c (W x + s B A x) + b`` with a factor c for each output. KaSA and unconverted PiSSA and OLoRA also take a
part of W out of it: a second low rank. Variants that are about training (VeLoRA, MonteCLoRA, MiCA) compute plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import refused
from onebase.adapters.formats.files import AdapterFiles, TensorBag
from onebase.adapters.formats.keys import check_shape, group_by_site
from onebase.adapters.formats.peft.lora_experts import take_expert_factors
from onebase.adapters.formats.peft.lora_factors import TOKEN_A, TOKEN_B, A, B, require, take_factors
from onebase.adapters.formats.peft.lora_settings import LoraSettings, Shift, Variant, read_settings
from onebase.adapters.formats.peft.lora_weights import dora_factor, dora_token_factor, shifted_part
from onebase.adapters.formats.peft.token_rows import lora_token_rows
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.program import LowRank, SiteOps, TokenLowRank
from onebase.kernels.ops.vector import ScaleOut

BIAS, MAGNITUDE, DIAGONAL = "lora_B.bias", "lora_magnitude_vector", "lora_diag"
_SUFFIXES = (A, B, BIAS, TOKEN_A, TOKEN_B, MAGNITUDE, DIAGONAL)
# Tensors that only training reads.
_TRAINING = {Variant.VELORA: (".lora_velora_embed",), Variant.MONTE_CARLO: (".lora_monteclora_sampler.",)}


@register(
    "LORA",
    title="LoRA",
    paper="2106.09685",
    covers=(
        "LoRA",
        "rsLoRA",
        "QLoRA",
        "QA-LoRA",
        "DyLoRA",
        "IncreLoRA",
        "SoRA",
        "LoRA-FA",
        "Laplace-LoRA",
        "LoRAHub",
        "DoRA",
        "PiSSA",
        "OLoRA",
        "KaSA",
    ),
    instructions=(
        "LowRank",
        "AddOut",
        "ScaleOut",
        "ExpertLowRank",
        "RouterLowRank",
        "Dense",
        "TokenRows",
        "OutputRows",
        "NormOverride",
    ),
    cost="4hr FLOPs, 2hr elements; DoRA: h more of both; PiSSA, OLoRA, KaSA: twice the rank",
    note="DoRA's norms are computed at load; PiSSA and KaSA need an SVD of each weight, on the host: convert PiSSA; "
    "target_parameters on experts and routers, and files of single experts from before they were stacked",
)
def compile_lora(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings = read_settings(files.fields, base)
    _drop_training(files.tensors, settings.variant)
    ops = take_expert_factors(files, base, settings)
    if ops and not settings.is_plain:
        raise refused("target_parameters", next(iter(ops)), "PEFT has nothing but plain LoRA on parameters of experts")
    for path, keys in group_by_site(files.tensors, base, _SUFFIXES).items():
        ops[path] = _site_ops(base.sites[path], keys, files.tensors, settings, base)
    rows = lora_token_rows(files, base)
    for path in ops.keys() & rows.keys():
        raise AdapterRejected(f"{path} has both factors and trained rows, which PEFT cannot run.", param=path)
    reads_weight = settings.variant is Variant.DORA or settings.shift is not Shift.NONE
    compiled = with_saved(ops | rows, files, base, Beside(weight=not reads_weight))
    return _activated(compiled, ops, settings) if settings.invocation else compiled


def _activated(compiled: Compiled, factors: Mapping[str, SiteOps], settings: LoraSettings) -> Compiled:
    """Activated LoRA masks the factors; whole parameters would act on every token."""
    whole = [path for path, op in compiled.ops.items() if op is not factors.get(path)]
    if whole or compiled.head is not None:
        raise refused(Variant.ACTIVATED, list(settings.invocation), "it is not served together with whole parameters")
    return Compiled(compiled.ops, invocation=settings.invocation)


def _drop_training(tensors: TensorBag, variant: Variant) -> None:
    for key in tensors:
        if any(part in f"{key}." for part in _TRAINING.get(variant, ())):
            tensors.drop(key)


def _site_ops(
    site: Site, keys: Mapping[str, str], tensors: TensorBag, settings: LoraSettings, base: BaseModel
) -> SiteOps:
    if site.kind is SiteKind.EMBEDDING:
        return _embedding_ops(site, keys, tensors, settings, base)
    rank = settings.rank(site.path)
    scale = settings.scale(site.path, rank)
    a, b = take_factors(site, keys, tensors, settings, rank)
    if settings.variant is Variant.KASA:
        a = a * _vector(site, keys, DIAGONAL, rank, tensors)[:, None]
    low_rank = LowRank(a, b.T.contiguous(), scale)
    if settings.variant is Variant.DORA:
        return _dora(site, low_rank, _vector(site, keys, MAGNITUDE, site.out_features, tensors), base)
    if settings.shift is not Shift.NONE:
        low_rank = _shifted(site, low_rank, settings.shift, base)
    bias: Tensor | None = None
    if settings.bias and (settings.blocks is None or settings.blocks.side(site.path) != "b"):
        bias = _vector(site, keys, BIAS, site.out_features, tensors) * scale
    return SiteOps(low_rank=low_rank, add_out=bias)


def _dora(site: Site, low_rank: LowRank, magnitude: Tensor, base: BaseModel) -> SiteOps:
    """c (W x + s B A x) + bias: the bias, which the scale would take along, is put back."""
    b = low_rank.b.float() * low_rank.scale
    factor = dora_factor(site, base, magnitude, low_rank.a.float(), b.T)
    bias = base.bias(site.path)
    add_out = None if bias is None else (1 - factor) * bias.detach().cpu().float()
    return SiteOps(LowRank(low_rank.a, b * factor, 1.0), None, add_out, (ScaleOut(factor - 1),))


def _shifted(site: Site, low_rank: LowRank, shift: Shift, base: BaseModel) -> LowRank:
    """Less the part of W that PEFT takes out."""
    if shift is Shift.LARGEST and low_rank.scale <= 0:
        raise refused("lora_alpha", low_rank.scale, "PiSSA divides by the scale: it must be over 0")
    a, b = shifted_part(shift, site, base, low_rank.rank)
    if shift is Shift.FIRST:
        b = b * low_rank.scale  # OLoRA's start is scaled like the adapter
    return LowRank(torch.cat([low_rank.a.float(), a]), torch.cat([low_rank.b.float() * low_rank.scale, -b]), 1.0)


def _embedding_ops(
    site: Site, keys: Mapping[str, str], tensors: TensorBag, settings: LoraSettings, base: BaseModel
) -> SiteOps:
    if settings.bias:
        raise refused("lora_bias", True, f"{site.path} is an embedding, which PEFT gives no bias")
    if settings.variant not in (Variant.PLAIN, Variant.DORA, Variant.MICA):
        raise refused(settings.variant, True, f"{site.path} is an embedding, for which PEFT does not have it")
    rank = settings.rank(site.path)
    scale = settings.scale(site.path, rank)
    a, b = take_factors(site, keys, tensors, settings, rank)
    op = TokenLowRank(a.T.contiguous(), b.T.contiguous(), scale * site.output_scale)
    if settings.variant is not Variant.DORA:
        return SiteOps(token_low_rank=op)
    magnitude = _vector(site, keys, MAGNITUDE, site.out_features, tensors)
    factor = dora_token_factor(site, base, magnitude, op.a.float(), op.b.float() * scale)
    return SiteOps(token_low_rank=TokenLowRank(op.a, op.b.float() * factor, op.scale), extra=(ScaleOut(factor - 1),))


def _vector(site: Site, keys: Mapping[str, str], suffix: str, size: int, tensors: TensorBag) -> Tensor:
    key = require(keys, suffix, site)
    check_shape(key, tensors, (size,), f"{size} by the config and the base")
    return tensors.take(key).float()
