"""LoRA on stacked expert weights and on routers: ``target_parameters`` of PEFT's LORA.

PEFT wraps a module of experts once for each parameter that it targets, in the order in which the module declares them,
and the file does not say which: the last one's factors are under the module itself, each earlier one's under one more
``base_layer``. lora_A [experts * r, in] holds expert e's row k at e*r + k; lora_B [out, r * experts] holds its column k
at k*experts + e. A router's matrix is targeted in the same way; a linear module's weight is read like any LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from onebase.adapters.base import BaseModel, ExpertParameter, Experts, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import refused
from onebase.adapters.formats.files import AdapterFiles, TensorBag
from onebase.adapters.formats.keys import check_shape
from onebase.adapters.formats.peft.lora_settings import LoraSettings
from onebase.adapters.formats.peft.lora_single_experts import take_single_experts, today
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.experts import ExpertLowRank, RouterLowRank

ROUTER_WEIGHT = "weight"
_PREFIXES = ("base_model.model.", "base_model.", "")
_SUFFIXES = {
    ".lora_A.weight": "lora_A.weight",
    ".lora_B.weight": "lora_B.weight",
    ".lora_A.default.weight": "lora_A.weight",
    ".lora_B.default.weight": "lora_B.weight",
}
_LAYER = ".base_layer"


def take_expert_factors(files: AdapterFiles, base: BaseModel, settings: LoraSettings) -> dict[str, SiteOps]:
    """Take target_parameters and every tensor of an EXPERTS or ROUTER site: site path -> its operations.

    Raises AdapterRejected naming the field or the key.
    """
    targets = files.fields.names("target_parameters")
    ops = take_single_experts(files.tensors, base, settings)
    for path, levels in _keys_by_site(files.tensors, base).items():
        if path in ops and not levels:
            continue  # single experts
        names = _targeted(path, levels, targets, base)
        _check_levels(path, () if path in ops else names, levels)
        if levels and path in base.experts:
            ops[path] = _experts_ops(path, base.experts[path], names, levels, files.tensors, settings)
        elif levels:
            ops[path] = _router_ops(base.sites[path], levels[0], files.tensors, settings)
    return ops


def _targeted(
    path: str, levels: Mapping[int, Mapping[str, str]], targets: Sequence[str], base: BaseModel
) -> tuple[str, ...]:
    """The targeted parameters of a site, in the order of the module. A router has one, and was a linear module once,
    which nobody had to target as a parameter: its tensors name it."""
    if path not in base.experts:
        return (ROUTER_WEIGHT,) if levels or _is_targeted(f"{path}.{ROUTER_WEIGHT}", targets) else ()
    return tuple(name for name in base.experts[path].parameters if _is_targeted(f"{path}.{name}", targets))


def _check_levels(path: str, names: Sequence[str], levels: Mapping[int, Mapping[str, str]]) -> None:
    """One level of wrappers for each targeted parameter. Raises AdapterRejected where they do not agree."""
    if sorted(levels) != list(range(len(names))):
        raise AdapterRejected(
            f"{path} has LoRA tensors for {len(levels)} parameters, and target_parameters names {len(names)} of its own"
            f" ({', '.join(names) or 'none'}): half an adapter is refused.",
            param=next((key for level in levels.values() for key in level.values()), "target_parameters"),
        )


def _keys_by_site(tensors: TensorBag, base: BaseModel) -> dict[str, dict[int, dict[str, str]]]:
    """Site path -> depth (number of base_layer parts) -> {suffix: key}; every EXPERTS and ROUTER site is there."""
    kinds = (SiteKind.EXPERTS, SiteKind.ROUTER)
    found: dict[str, dict[int, dict[str, str]]] = {path: {} for path in base.sites if base.sites[path].kind in kinds}
    for key in tensors if found else ():
        ending = next((ending for ending in _SUFFIXES if key.endswith(ending)), None)
        module = key.removesuffix(ending or "").replace("_orig_mod.", "")
        depth = 0
        while module.endswith(_LAYER):
            module, depth = module.removesuffix(_LAYER), depth + 1
        paths = (today(_without(module, prefix), base) for prefix in _PREFIXES)
        path = next((path for path in paths if path in found), None)
        if ending is None or path is None:
            continue
        level = found[path].setdefault(depth, {})
        if _SUFFIXES[ending] in level:
            raise AdapterRejected(f"The tensors {level[_SUFFIXES[ending]]!r} and {key!r} mean the same.", param=key)
        level[_SUFFIXES[ending]] = key
    return found


def _without(module: str, prefix: str) -> str:
    return module.removeprefix(prefix) if module.startswith(prefix) else ""


def _experts_ops(
    path: str,
    experts: Experts,
    names: Sequence[str],
    levels: Mapping[int, Mapping[str, str]],
    tensors: TensorBag,
    settings: LoraSettings,
) -> SiteOps:
    depths = range(len(names) - 1, -1, -1)  # the first parameter lies deepest
    pairs = zip(names, depths, strict=True)
    return SiteOps(
        extra=tuple(_low_rank(path, name, experts, levels[depth], tensors, settings) for name, depth in pairs)
    )


def _router_ops(site: Site, keys: Mapping[str, str], tensors: TensorBag, settings: LoraSettings) -> SiteOps:
    name = f"{site.path}.{ROUTER_WEIGHT}"
    a, b = _both(name, keys)
    rank = settings.rank(name)
    check_shape(a, tensors, (rank, site.in_features), f"rank {rank}")
    check_shape(b, tensors, (site.out_features, rank), f"rank {rank}")
    low_rank = RouterLowRank(tensors.take(a), tensors.take(b).T.contiguous(), settings.scale(name, rank))
    return SiteOps(extra=(low_rank,))


def _is_targeted(parameter: str, targets: Sequence[str]) -> bool:
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)


def _low_rank(
    path: str, name: str, experts: Experts, keys: Mapping[str, str], tensors: TensorBag, settings: LoraSettings
) -> ExpertLowRank:
    shape = next((part for part in (experts.up, experts.down) if part.name == name), None)
    if shape is None:
        raise refused("target_parameters", name, f"of {path}, {experts.up.name} and {experts.down.name} are served")
    a, b = _both(f"{path}.{name}", keys)
    rank = settings.rank(f"{path}.{name}")
    for key, expected in _expected(shape, experts.num_experts, rank, a, b):
        check_shape(key, tensors, expected, f"rank {rank} for each of {experts.num_experts} experts' {name}")
    return ExpertLowRank(
        parameter=name,
        a=tensors.take(a).view(experts.num_experts, rank, shape.in_features),
        b=tensors.take(b).view(shape.out_features, rank, experts.num_experts).permute(2, 1, 0).contiguous(),
        factor=settings.scale(f"{path}.{name}", rank),
        per_token=experts.per_token,
    )


def _both(name: str, keys: Mapping[str, str]) -> tuple[str, str]:
    if keys.keys() != set(_SUFFIXES.values()):
        present = next(iter(keys.values()))
        raise AdapterRejected(f"{name} has only {present!r}: half an adapter is refused.", param=present)
    return keys["lora_A.weight"], keys["lora_B.weight"]


def _expected(
    shape: ExpertParameter, num_experts: int, rank: int, a: str, b: str
) -> Iterator[tuple[str, tuple[int, int]]]:
    yield a, (num_experts * rank, shape.in_features)
    yield b, (shape.out_features, num_experts * rank)
