"""PEFT's ADALORA. Zhang et al., "AdaLoRA" (2303.10512).

``y += s B ((A * E) x)`` with s = alpha / (init_r + 1e-5): the divisor is the rank before pruning, whatever the file's.
rank_pattern says which of the init_r directions of a module are left; none may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onebase.adapters.base import BaseModel, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import MAX_RANK, Fields, refused
from onebase.adapters.formats.files import AdapterFiles, TensorBag
from onebase.adapters.formats.keys import check_shape, find_site, group_by_site
from onebase.adapters.formats.peft.lora_settings import HARMLESS
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.program import LowRank, SiteOps

_A, _B, _E = "lora_A", "lora_B", "lora_E"
_TRAINING = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
# Fields that AdaLoRA has from LoRA, and does not read.
_UNREAD = ("r", "alpha_pattern", "init_lora_weights", "use_rslora", "lora_bias", "ensure_weight_tying", "eva_config")
_UNSERVED = dict.fromkeys(
    (
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "velora_config",
    ),
    "AdaLoRA has no such variant",
)


@dataclass(frozen=True, slots=True)
class _Settings:
    init_r: int
    alpha: float
    kept: Mapping[str, int]  # site path -> directions that are left

    def scale(self, rank: int) -> float:
        return (self.alpha if self.alpha > 0 else rank) / (self.init_r + 1e-5)


@register(
    "ADALORA",
    title="AdaLoRA",
    paper="2303.10512",
    covers=("AdaLoRA",),
    instructions=("LowRank",),
    cost="4hr FLOPs, 2hr elements",
    note="ranks by module, as rank_pattern has them",
)
def compile_adalora(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings = _read_settings(files.fields, base)
    ops: dict[str, SiteOps] = {}
    for path, keys in group_by_site(files.tensors, base, (_A, _B, _E)).items():
        ops[path] = _site_ops(base.sites[path], keys, files.tensors, settings)
    return with_saved(ops, files, base, Beside(weight=True))


def _read_settings(fields: Fields, base: BaseModel) -> _Settings:
    fields.ignore((*HARMLESS, *_TRAINING, *_UNREAD))
    fields.must_be_unset(_UNSERVED)
    init_r = fields.integer("init_r", 1, MAX_RANK)
    return _Settings(init_r, fields.number("lora_alpha"), _read_pattern(fields, init_r, base))


def _read_pattern(fields: Fields, init_r: int, base: BaseModel) -> dict[str, int]:
    """{site path: directions that are left}, from {"<module>.lora_E": one flag for each direction}."""
    value = fields.take("rank_pattern")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refused("rank_pattern", value, "it must map lora_E's names to lists of flags")
    kept: dict[str, int] = {}
    for name, flags in value.items():
        if not isinstance(flags, list) or len(flags) != init_r or any(not isinstance(flag, bool) for flag in flags):
            raise refused(f"rank_pattern[{name[:100]!r}]", flags, f"it must be a list of init_r = {init_r} flags")
        module = name.removesuffix(".default").removesuffix(f".{_E}")
        kept[find_site(name, module, base).path] = sum(flag is True for flag in flags)
    return kept


def _site_ops(site: Site, keys: Mapping[str, str], tensors: TensorBag, settings: _Settings) -> SiteOps:
    if site.kind is not SiteKind.LINEAR:
        raise AdapterRejected(
            f"{site.path} is a {site.kind} of the base: AdaLoRA adapts linear modules.", param=site.path
        )
    rank = settings.kept.get(site.path, settings.init_r)
    meaning = f"rank {rank} by init_r and rank_pattern, {site.in_features} in, {site.out_features} out"
    shapes = {_A: (rank, site.in_features), _B: (site.out_features, rank), _E: (rank, 1)}
    for suffix, shape in shapes.items():
        if suffix not in keys:
            raise AdapterRejected(
                f"{site.path} needs a tensor {suffix!r}: half an adapter is refused.", param=site.path
            )
        check_shape(keys[suffix], tensors, shape, meaning)
    a, b, e = (tensors.take(keys[suffix]).float() for suffix in shapes)
    if rank == 0:
        return SiteOps()
    return SiteOps(low_rank=LowRank(a * e, b.T.contiguous(), settings.scale(rank)))
