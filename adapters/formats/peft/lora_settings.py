"""What the config of a LORA says: ranks and scales by module, and at most one variant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from onebase.adapters.base import BaseModel, SiteKind
from onebase.adapters.formats.fields import MAX_RANK, Fields, as_names, refused
from onebase.adapters.formats.patterns import PatternTable
from onebase.adapters.strict_json import JsonValue

MAX_INVOCATION = 1024

HARMLESS = (
    "corda_config",  # with init_lora_weights: how training started
    "eva_config",
    "exclude_modules",
    "ensure_weight_tying",  # what is tied has tensors of its own, or trained rows
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",  # without use_qalora
    "runtime_config",
    "target_modules",
)
_UNSERVED = {
    "arrow_config": "Arrow routes between adapters that are in other files; serve them on their own",
    "layer_replication": "it changes the depth of the base",
}
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora")
_INIT_REASON = (
    "it changed the base's weights in a way that the files do not tell; convert the adapter to plain LoRA with "
    "save_pretrained's path_initial_model_for_weight_conversion (true, false, gaussian, eva, orthogonal, mica, pissa "
    "and olora are served; pissa_niter_ draws random numbers without a seed)"
)


_BLOCK_FIELDS = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}


class Variant(StrEnum):
    """What PEFT computes in place of plain LoRA; it never combines two of them. By the field that asks for it."""

    PLAIN = "plain LoRA"
    ACTIVATED = "alora_invocation_tokens"
    BLOCKS = "use_bdlora"
    DORA = "use_dora"
    KASA = "kasa_config"
    MICA = "mica"
    MONTE_CARLO = "monteclora_config"
    QUANTIZED = "use_qalora"
    VELORA = "velora_config"


class Shift(StrEnum):
    """Which part of the base's weight PEFT takes out of it when it loads the adapter. The rank is the adapter's."""

    NONE = "none"
    LARGEST = "largest singular parts"  # PiSSA
    FIRST = "first columns' span"  # OLoRA
    SMALLEST = "smallest singular parts"  # KaSA


@dataclass(frozen=True, slots=True)
class Blocks:
    """BD-LoRA: which factor is block-diagonal, by parts of module paths."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    count: int
    strict: bool

    def side(self, path: str) -> str:
        """``a``, ``b`` or nothing. Raises AdapterRejected where both are meant, or none and one has to be."""
        sides = [side for side, parts in (("a", self.a), ("b", self.b)) if any(part in path for part in parts)]
        if len(sides) > 1 or (self.strict and not sides):
            reason = f"{path} must match exactly one of target_modules_bd_a and target_modules_bd_b"
            raise refused(Variant.BLOCKS, [*self.a, *self.b], reason)
        return sides[0] if sides else ""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """ranks, alphas: by module, over r and alpha. bias: whether B has one. group: QALoRA's inputs for each of A's."""

    r: int
    alpha: float
    ranks: PatternTable
    alphas: PatternTable
    rank_stabilized: bool
    bias: bool
    variant: Variant = Variant.PLAIN
    shift: Shift = Shift.NONE
    blocks: Blocks | None = None
    group: int = 1
    invocation: tuple[int, ...] = ()

    def rank(self, path: str) -> int:
        found = self.ranks.find(path)
        return self.r if found is None else int(found)

    def scale(self, path: str, rank: int) -> float:
        found = self.alphas.find(path)
        alpha = self.alpha if found is None else found
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    @property
    def is_plain(self) -> bool:
        return self.variant is Variant.PLAIN and self.shift is Shift.NONE and not self.bias


def read_settings(fields: Fields, base: BaseModel) -> LoraSettings:
    """Take every field that is no tensor's own. Raises AdapterRejected naming the field."""
    init = fields.choice("init_lora_weights", _INITS, True, _INIT_REASON)
    blocks = _read_blocks(fields.take(Variant.BLOCKS))
    invocation = _read_invocation(fields.take(Variant.ACTIVATED), base)
    variant = _pick_variant(
        {
            Variant.DORA: fields.flag(Variant.DORA),
            Variant.QUANTIZED: fields.flag(Variant.QUANTIZED),
            Variant.BLOCKS: blocks is not None,
            Variant.ACTIVATED: bool(invocation),
            Variant.MICA: init == "mica",
            Variant.KASA: _has_section(fields, Variant.KASA),
            Variant.MONTE_CARLO: _has_section(fields, Variant.MONTE_CARLO),
            Variant.VELORA: _has_section(fields, Variant.VELORA),
        }
    )
    group = fields.integer("qalora_group_size", 1, 1 << 20, default=16)
    shift = _read_shift(fields, init, variant)
    fields.ignore(HARMLESS)
    fields.must_be_unset(_UNSERVED)
    return LoraSettings(
        r=fields.integer("r", 1, MAX_RANK),
        alpha=fields.number("lora_alpha"),
        ranks=PatternTable("rank_pattern", _read_ranks(fields)),
        alphas=PatternTable("alpha_pattern", fields.numbers("alpha_pattern")),
        rank_stabilized=fields.flag("use_rslora"),
        bias=_read_bias(fields, init, variant),
        variant=variant,
        shift=shift,
        blocks=blocks,
        group=group if variant is Variant.QUANTIZED else 1,
        invocation=invocation,
    )


def _pick_variant(asked: Mapping[Variant, bool]) -> Variant:
    found = [variant for variant, is_asked in asked.items() if is_asked]
    if len(found) > 1:
        raise refused(found[0], True, f"PEFT does not combine it with {found[1]}")
    return found[0] if found else Variant.PLAIN


def _has_section(fields: Fields, variant: Variant) -> bool:
    """Its options are about training."""
    value = fields.take(variant)
    if value is not None and not isinstance(value, dict):
        raise refused(variant, value, "it must be an object or null")
    return value is not None


def _read_shift(fields: Fields, init: JsonValue, variant: Variant) -> Shift:
    shifts = {"pissa": Shift.LARGEST, "olora": Shift.FIRST}
    shift = shifts.get(init, Shift.NONE) if isinstance(init, str) else Shift.NONE
    if shift is not Shift.NONE and variant is not Variant.PLAIN:
        raise refused("init_lora_weights", init, f"it is served with plain LoRA, not with {variant}")
    shift = Shift.SMALLEST if variant is Variant.KASA else shift
    if fields.flag("fan_in_fan_out") and shift in (Shift.FIRST, Shift.SMALLEST):
        raise refused("fan_in_fan_out", True, "PEFT computes neither KaSA nor OLoRA over transposed weights")
    return shift


def _read_bias(fields: Fields, init: JsonValue, variant: Variant) -> bool:
    bias = fields.flag("lora_bias")
    if bias and (variant in (Variant.DORA, Variant.QUANTIZED) or isinstance(init, str)):
        raise refused("lora_bias", True, "PEFT has it neither with DoRA or QALoRA nor with another init_lora_weights")
    return bias


def _read_ranks(fields: Fields) -> dict[str, float]:
    ranks = fields.numbers("rank_pattern")
    for key, rank in ranks.items():
        if not rank.is_integer() or not 1 <= rank <= MAX_RANK:
            raise refused("rank_pattern", {key: rank}, f"ranks are integers from 1 to {MAX_RANK}")
    return ranks


def _read_blocks(value: JsonValue) -> Blocks | None:
    if value is None or value is False:
        return None
    if not isinstance(value, dict) or not value.keys() <= _BLOCK_FIELDS:
        raise refused(Variant.BLOCKS, value, f"it must be an object with no other fields than {sorted(_BLOCK_FIELDS)}")
    count, strict = value.get("nblocks", 1), value.get("match_strict", True)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_RANK:
        raise refused("use_bdlora.nblocks", count, f"it must be an integer from 1 to {MAX_RANK}")
    if not isinstance(strict, bool):
        raise refused("use_bdlora.match_strict", strict, "it must be true or false")
    a, b = (as_names(name, value.get(name)) for name in ("target_modules_bd_a", "target_modules_bd_b"))
    return Blocks(a, b, count, strict)


def _read_invocation(value: JsonValue, base: BaseModel) -> tuple[int, ...]:
    items = [] if value is None else value
    vocabulary = max((site.in_features for site in base.sites.values() if site.kind is SiteKind.EMBEDDING), default=0)
    if not isinstance(items, list) or len(items) > MAX_INVOCATION:
        raise refused(Variant.ACTIVATED, value, f"it must be a list of at most {MAX_INVOCATION} tokens")
    tokens = [item for item in items if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < vocabulary]
    if len(tokens) < len(items):
        raise refused(Variant.ACTIVATED, value, "it must name tokens of the base")
    return tuple(tokens)
