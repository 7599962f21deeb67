"""PEFT's LORA. Hu et al., "LoRA" (2106.09685); Kalajdzievski, "rank stabilization" (2312.03732).

At a linear site ``y += s (B A x + bias)``, at an embedding ``y += s B A[:, token]``, with s = alpha / r, or
alpha / sqrt(r) for rsLoRA; rank_pattern and alpha_pattern give r and alpha by module. An embedding module that scales
what it looks up (Gemma's) scales the adapter's part too: s includes the site's output_scale.
Targets are the modules that have tensors: target_modules and its relatives say nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from onebase.adapters.base import BaseModel, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import MAX_RANK, Fields, refused
from onebase.adapters.formats.files import AdapterFiles, TensorBag
from onebase.adapters.formats.keys import check_shape, group_by_site, take_base_copy
from onebase.adapters.formats.lora_experts import take_expert_factors
from onebase.adapters.formats.patterns import PatternTable
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.program import LowRank, SiteOps, TokenLowRank

A, B, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
TOKEN_A, TOKEN_B = "lora_embedding_A", "lora_embedding_B"
BASE_COPIES = ("base_layer.weight", "weight")

_HARMLESS = (
    "corda_config",  # with init_lora_weights: how training started
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",  # with use_qalora, which is refused
    "runtime_config",
    "target_modules",
)
_UNSERVED = {
    "alora_invocation_tokens": "activated LoRA is not served yet",
    "arrow_config": "Arrow routing is not served yet",
    "ensure_weight_tying": "tied adapters are not served yet; set it to false if no embedding or head is adapted",
    "kasa_config": "KaSA changes the base's weights and is not served yet",
    "layer_replication": "it changes the depth of the base",
    "modules_to_save": "full copies of modules are not served yet",
    "monteclora_config": "MonteCLoRA is not served yet",
    "trainable_token_indices": "trained token rows are not served yet",
    "use_bdlora": "block-diagonal LoRA is not served yet",
    "use_dora": "DoRA is not served yet",
    "use_qalora": "QALoRA is not served yet",
    "velora_config": "VeLoRA is not served yet",
}
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_INIT_REASON = (
    "it may have changed the base's weights; convert the adapter to plain LoRA with save_pretrained's "
    "path_initial_model_for_weight_conversion (true, false, gaussian, eva, orthogonal and mica are served)"
)


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What the config says about ranks and scales."""

    r: int
    alpha: float
    ranks: PatternTable
    alphas: PatternTable
    rank_stabilized: bool
    bias: bool

    def rank(self, path: str) -> int:
        found = self.ranks.find(path)
        return self.r if found is None else int(found)

    def scale(self, path: str, rank: int) -> float:
        found = self.alphas.find(path)
        alpha = self.alpha if found is None else found
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


@register(
    "LORA",
    title="LoRA",
    paper="2106.09685",
    covers=("LoRA", "rsLoRA", "QLoRA", "DyLoRA", "IncreLoRA", "SoRA", "LoRA-FA", "Laplace-LoRA", "LoRAHub"),
    instructions=("LowRank", "AddOut", "ExpertLowRank"),
    cost="4hr FLOPs, 2hr elements",
)
def compile_lora(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings = read_settings(files.fields)
    suffixes = (A, B, BIAS, TOKEN_A, TOKEN_B, *BASE_COPIES)
    ops = take_expert_factors(files, base, settings)
    for path, keys in group_by_site(files.tensors, base, suffixes).items():
        for copy in BASE_COPIES:
            if key := keys.pop(copy, None):
                take_base_copy(key, files.tensors, base, path)
        if keys:
            ops[path] = _site_ops(base.sites[path], keys, files.tensors, settings)
    return Compiled(ops)


def read_settings(fields: Fields) -> LoraSettings:
    fields.ignore(_HARMLESS)
    fields.must_be_unset(_UNSERVED)
    fields.choice("bias", ("none",), "none", "trained base biases are not served yet; it must be 'none'")
    fields.choice("init_lora_weights", _INITS, True, _INIT_REASON)
    ranks = fields.numbers("rank_pattern")
    for key, rank in ranks.items():
        if not rank.is_integer() or not 1 <= rank <= MAX_RANK:
            raise refused("rank_pattern", {key: rank}, f"ranks are integers from 1 to {MAX_RANK}")
    return LoraSettings(
        r=fields.integer("r", 1, MAX_RANK),
        alpha=fields.number("lora_alpha"),
        ranks=PatternTable("rank_pattern", ranks),
        alphas=PatternTable("alpha_pattern", fields.numbers("alpha_pattern")),
        rank_stabilized=fields.flag("use_rslora"),
        bias=fields.flag("lora_bias"),
    )


def _site_ops(site: Site, keys: Mapping[str, str], tensors: TensorBag, settings: LoraSettings) -> SiteOps:
    if site.kind is SiteKind.EMBEDDING:
        return _embedding_ops(site, keys, tensors, settings)
    rank = settings.rank(site.path)
    scale = settings.scale(site.path, rank)
    a, b = _factors(site, keys, (A, B), tensors, rank)
    bias: Tensor | None = None
    if settings.bias:
        key = _require(keys, BIAS, site)
        check_shape(key, tensors, (site.out_features,), "out_features")
        bias = tensors.take(key).float() * scale
    return SiteOps(low_rank=LowRank(a, b.T.contiguous(), scale), add_out=bias)


def _embedding_ops(site: Site, keys: Mapping[str, str], tensors: TensorBag, settings: LoraSettings) -> SiteOps:
    if settings.bias:
        raise refused("lora_bias", True, f"{site.path} is an embedding, which PEFT gives no bias")
    rank = settings.rank(site.path)
    a, b = _factors(site, keys, (TOKEN_A, TOKEN_B), tensors, rank)
    scale = settings.scale(site.path, rank) * site.output_scale
    return SiteOps(token_low_rank=TokenLowRank(a.T.contiguous(), b.T.contiguous(), scale))


def _factors(
    site: Site, keys: Mapping[str, str], suffixes: tuple[str, str], tensors: TensorBag, rank: int
) -> tuple[Tensor, Tensor]:
    """a: [rank, in_features], b: [out_features, rank], as the file has them."""
    key_a, key_b = (_require(keys, suffix, site) for suffix in suffixes)
    meaning = f"rank {rank} by r and rank_pattern, {site.in_features} in, {site.out_features} out"
    check_shape(key_a, tensors, (rank, site.in_features), meaning)
    check_shape(key_b, tensors, (site.out_features, rank), meaning)
    return tensors.take(key_a), tensors.take(key_b)


def _require(keys: Mapping[str, str], suffix: str, site: Site) -> str:
    if suffix in keys:
        return keys[suffix]
    present = next(iter(keys.values()))
    raise AdapterRejected(
        f"{site.path} ({site.kind}) needs a tensor {suffix!r}, and has only {present!r} and its like: "
        "half an adapter is refused.",
        param=present,
    )
