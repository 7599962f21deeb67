"""LoRA files from before experts were stacked: a pair of factors for each expert and projection.

transformers 4 had a linear module for each (``experts.3.w1``, ``experts.3.gate_proj``). PEFT reads such a file by
fusing it, and so does this: the halves of gate and up become one factor of twice the rank, B block-diagonal, with the
scale of each half. A router that was a linear module is one of today's; see lora_experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Experts
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import refused
from onebase.adapters.formats.files import TensorBag
from onebase.adapters.formats.keys import check_shape
from onebase.adapters.formats.peft.lora_settings import LoraSettings
from onebase.adapters.program import SiteOps
from onebase.adapters.strict_json import JsonValue
from onebase.kernels.ops.experts import ExpertLowRank

# What the projections were called, in the order in which they are fused, and what the block was called.
_NAMES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_OLD_BLOCK, _BLOCK = ".block_sparse_moe.", ".mlp."
_FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, slots=True)
class SingleKey:
    """A key of one expert's factor. module: as the file has it, which is what the config's patterns mean."""

    key: str
    module: str
    expert: int
    role: str
    factor: str


def today(path: str, base: BaseModel) -> str:
    """Where a module of an old file is in the base: Mixtral's block has another name."""
    return path if path in base.sites or _OLD_BLOCK not in path else path.replace(_OLD_BLOCK, _BLOCK)


def take_single_experts(tensors: TensorBag, base: BaseModel, settings: LoraSettings) -> dict[str, SiteOps]:
    """Take every tensor of one expert alone: EXPERTS site -> its operations. Raises AdapterRejected naming the key."""
    found: dict[str, dict[tuple[str, int, str], SingleKey]] = {}
    for key in tensors if base.experts else ():
        named = _parse(key, base)
        if named is not None:
            path, single = named
            found.setdefault(path, {})[single.role, single.expert, single.factor] = single
    if found and settings.rank_stabilized:
        reason = "in a file of single experts, which PEFT fuses with another scale than the one that was trained"
        raise refused("use_rslora", True, reason)
    return {path: _site_ops(path, base.experts[path], keys, tensors, settings) for path, keys in found.items()}


def _parse(key: str, base: BaseModel) -> tuple[str, SingleKey] | None:
    """(EXPERTS site, what the key holds); None for other keys."""
    parts = key.removeprefix("base_model.model.").removeprefix("base_model.").split(".")
    if len(parts) < 5 or parts[-1] != "weight" or parts[-2] not in _FACTORS or parts[-3] not in _NAMES:
        return None
    *block, expert, name, factor, _ = parts
    path = today(".".join(block), base)
    if path not in base.experts or not expert.isascii() or not expert.isdecimal() or len(expert) > 6:
        return None
    module = ".".join([*block, expert, name])
    return path, SingleKey(key, module, int(expert), _NAMES[name], factor)


def _site_ops(
    path: str,
    experts: Experts,
    keys: Mapping[tuple[str, int, str], SingleKey],
    tensors: TensorBag,
    settings: LoraSettings,
) -> SiteOps:
    if experts.up.name != "gate_up_proj" or experts.interleaved or experts.up.transposed:
        key = next(iter(keys.values())).key
        raise AdapterRejected(f"{path} never had single experts: {key!r} has no meaning there.", param=key)
    width, inner = experts.down.out_features, experts.down.in_features
    sizes = {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    extra: list[ExpertLowRank] = []
    for name, roles in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        if any(role in roles for role, _, _ in keys):
            halves = [_Stack(path, role, sizes[role], experts.num_experts, keys) for role in roles]
            extra.append(_fused(name, experts, halves, tensors, settings))
    if unknown := [single.key for (_, expert, _), single in keys.items() if expert >= experts.num_experts]:
        raise AdapterRejected(f"{path} has {experts.num_experts} experts: {unknown[0]!r} is none's.", param=unknown[0])
    return SiteOps(extra=tuple(extra))


@dataclass(frozen=True, slots=True)
class _Stack:
    """One projection of every expert. size: (in_features, out_features)."""

    path: str
    role: str
    size: tuple[int, int]
    count: int
    keys: Mapping[tuple[str, int, str], SingleKey]

    def single(self, expert: int, factor: str) -> SingleKey:
        found = self.keys.get((self.role, expert, factor))
        if found is None:
            present = next(iter(self.keys.values())).key
            raise AdapterRejected(
                f"{self.path} has {present!r} and no {factor} of expert {expert}'s {self.role} projection: all experts "
                "are adapted, gate and up together, or none.",
                param=present,
            )
        return found

    def rank_and_scale(self, settings: LoraSettings) -> tuple[int, float]:
        """Of all experts alike: they are one tensor here. Raises AdapterRejected where a pattern tells them apart."""
        modules = [self.single(expert, "lora_A").module for expert in range(self.count)]
        found = {(rank := settings.rank(module), settings.scale(module, rank)) for module in modules}
        if len(found) > 1:
            reason = f"the experts of {self.path} must have one rank and one alpha"
            ranks: list[JsonValue] = [rank for rank, _ in sorted(found)]
            raise refused("rank_pattern", ranks, reason)
        return found.pop()

    def take(self, factor: str, rank: int, tensors: TensorBag) -> Tensor:
        """[count, rank, in_features], or lora_B rank-major: [count, rank, out_features]."""
        shape = (rank, self.size[0]) if factor == "lora_A" else (self.size[1], rank)
        taken: list[Tensor] = []
        for expert in range(self.count):
            key = self.single(expert, factor).key
            check_shape(key, tensors, shape, f"rank {rank}, {self.size[0]} in, {self.size[1]} out")
            taken.append(tensors.take(key))
        stack = torch.stack(taken)
        return stack if factor == "lora_A" else stack.mT.contiguous()


def _fused(
    name: str, experts: Experts, halves: Sequence[_Stack], tensors: TensorBag, settings: LoraSettings
) -> ExpertLowRank:
    """The projections side by side: A's one below the other, B's block-diagonal, each with its own scale in B."""
    found = [half.rank_and_scale(settings) for half in halves]
    a = torch.cat([half.take("lora_A", rank, tensors) for half, (rank, _) in zip(halves, found, strict=True)], dim=1)
    b = torch.zeros(experts.num_experts, a.shape[1], sum(half.size[1] for half in halves))
    row = column = 0
    for half, (rank, scale) in zip(halves, found, strict=True):
        width = half.size[1]
        b[:, row : row + rank, column : column + width] = half.take("lora_B", rank, tensors).float() * scale
        row, column = row + rank, column + width
    return ExpertLowRank(name, a, b, 1.0, experts.per_token)
