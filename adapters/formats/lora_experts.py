"""LoRA on stacked expert weights: ``target_parameters`` of PEFT's LORA.

PEFT wraps a module of experts once for each parameter that it targets, in the order in which the module declares them,
and the file does not say which: the last one's factors are under the module itself, each earlier one's under one more
``base_layer``. lora_A [experts * r, in] holds expert e's row k at e*r + k; lora_B [out, r * experts] holds its column k
at k*experts + e. Everything else that PEFT allows to target this way is a module of its own, read as any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from onebase.adapters.base import BaseModel, ExpertParameter, Experts
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import refused
from onebase.adapters.formats.files import AdapterFiles, TensorBag
from onebase.adapters.formats.keys import check_shape
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.experts import ExpertLowRank

_PREFIXES = ("base_model.model.", "base_model.", "")
_SUFFIXES = {
    ".lora_A.weight": "lora_A.weight",
    ".lora_B.weight": "lora_B.weight",
    ".lora_A.default.weight": "lora_A.weight",
    ".lora_B.default.weight": "lora_B.weight",
}
_LAYER = ".base_layer"


class RankTable(Protocol):
    """What the config says of ranks and scales, by ``<path of a module>.<name of its parameter>``."""

    def rank(self, path: str) -> int: ...

    def scale(self, path: str, rank: int) -> float: ...


def take_expert_factors(files: AdapterFiles, base: BaseModel, settings: RankTable) -> dict[str, SiteOps]:
    """Take target_parameters and every tensor of an EXPERTS site: site path -> its operations.

    Raises AdapterRejected naming the field or the key.
    """
    targets = files.fields.names("target_parameters")
    return {
        path: _site_ops(path, base.experts[path], levels, targets, files.tensors, settings)
        for path, levels in _keys_by_site(files.tensors, base).items()
    }


def _keys_by_site(tensors: TensorBag, base: BaseModel) -> dict[str, dict[int, dict[str, str]]]:
    """Site path -> depth (number of base_layer parts) -> {suffix: key}."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for key in tensors if base.experts else ():
        ending = next((ending for ending in _SUFFIXES if key.endswith(ending)), None)
        module = key.removesuffix(ending or "")
        depth = 0
        while module.endswith(_LAYER):
            module, depth = module.removesuffix(_LAYER), depth + 1
        path = next((path for prefix in _PREFIXES if (path := _without(module, prefix)) in base.experts), None)
        if ending is None or path is None:
            continue
        level = found.setdefault(path, {}).setdefault(depth, {})
        if _SUFFIXES[ending] in level:
            raise AdapterRejected(f"The tensors {level[_SUFFIXES[ending]]!r} and {key!r} mean the same.", param=key)
        level[_SUFFIXES[ending]] = key
    return found


def _without(module: str, prefix: str) -> str:
    return module.removeprefix(prefix) if module.startswith(prefix) else ""


def _site_ops(
    path: str,
    experts: Experts,
    levels: Mapping[int, Mapping[str, str]],
    targets: Sequence[str],
    tensors: TensorBag,
    settings: RankTable,
) -> SiteOps:
    names = [name for name in experts.parameters if _is_targeted(f"{path}.{name}", targets)]
    some_key = next(iter(levels[min(levels)].values()))
    if sorted(levels) != list(range(len(names))):
        raise AdapterRejected(
            f"{path} has LoRA tensors for {len(levels)} parameters, and target_parameters names {len(names)} of its "
            f"{list(experts.parameters)}.",
            param=some_key,
        )
    depths = range(len(names) - 1, -1, -1)  # the first parameter lies deepest
    pairs = zip(names, depths, strict=True)
    return SiteOps(
        extra=tuple(_low_rank(path, name, experts, levels[depth], tensors, settings) for name, depth in pairs)
    )


def _is_targeted(parameter: str, targets: Sequence[str]) -> bool:
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)


def _low_rank(
    path: str, name: str, experts: Experts, keys: Mapping[str, str], tensors: TensorBag, settings: RankTable
) -> ExpertLowRank:
    shape = next((part for part in (experts.up, experts.down) if part.name == name), None)
    if shape is None:
        raise refused("target_parameters", name, f"of {path}, {experts.up.name} and {experts.down.name} are served")
    if keys.keys() != {"lora_A.weight", "lora_B.weight"}:
        present = next(iter(keys.values()))
        raise AdapterRejected(f"{path}.{name} has only {present!r}: half an adapter is refused.", param=present)
    rank = settings.rank(f"{path}.{name}")
    a, b = keys["lora_A.weight"], keys["lora_B.weight"]
    for key, expected in _expected(shape, experts.num_experts, rank, a, b):
        check_shape(key, tensors, expected, f"rank {rank} for each of {experts.num_experts} experts' {name}")
    return ExpertLowRank(
        parameter=name,
        a=tensors.take(a).view(experts.num_experts, rank, shape.in_features),
        b=tensors.take(b).view(shape.out_features, rank, experts.num_experts).permute(2, 1, 0).contiguous(),
        factor=settings.scale(f"{path}.{name}", rank),
        per_token=experts.per_token,
    )


def _expected(
    shape: ExpertParameter, num_experts: int, rank: int, a: str, b: str
) -> Iterator[tuple[str, tuple[int, int]]]:
    yield a, (num_experts * rank, shape.in_features)
    yield b, (shape.out_features, num_experts * rank)
