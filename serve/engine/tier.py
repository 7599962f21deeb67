"""Puts a loaded base behind its adapters: arena, tables, kernels, and every site wrapped."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from onebase.adapters.base import SiteKind
from onebase.adapters.formats import compile_folder
from onebase.adapters.program import AdapterProgram
from onebase.adapters.tiers.arena import Arena
from onebase.adapters.tiers.cache import AdapterCache
from onebase.adapters.tiers.compiled import CompiledForms
from onebase.kernels.dispatch import select_kernels
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.tables import ProgramTables, SiteShape
from onebase.serve.engine.config import GIB, EngineConfig
from onebase.serve.engine.host_memory import HostMemory
from onebase.serve.model.loader import LoadedModel
from onebase.serve.model.site_context import SiteContext, StepPlans
from onebase.serve.model.sites import wrap_sites

_HOST_SHARE_CUDA, _MOST_CUDA = 0.25, 64 * GIB
_HOST_SHARE_CPU, _MOST_CPU = 0.05, 2 * GIB


def adapter_tier(
    config: EngineConfig, base: LoadedModel, arena: Arena, plans: StepPlans, instructions: InstructionTable
) -> AdapterCache:
    """The device tier over an arena. Once for a base: its modules' forwards are replaced."""
    sites = [entry.site for entry in base.probed]
    tables = ProgramTables(arena.buffer, [SiteShape(site.in_features, site.out_features) for site in sites])
    kernels = select_kernels(tables, "reference") if config.deterministic else select_kernels(tables)
    kernels.warm_up({entry.group for entry in base.probed if entry.site.kind is SiteKind.LINEAR})
    context = SiteContext(kernels, tables, instructions, plans, base.context.sums)
    wrap_sites(base.probed, base.norms, base.blocks, context)
    base.context.adapt(context, [layer.attention for layer in base.layers])
    index = {site.path: i for i, site in enumerate(sites)}
    return AdapterCache(
        arena,
        tables,
        kernels,
        instructions,
        index,
        partial(_compile, base),
        linears=frozenset(site.path for site in sites if site.kind is SiteKind.LINEAR),
        forms=compiled_forms(config, base),
        host_bytes=host_budget(config, base.device.type),
    )


def compiled_forms(config: EngineConfig, base: LoadedModel) -> CompiledForms | None:
    """The disk tier. Forms belong to the weights, to the places that adapters can touch, and to the kind of device:
    what is computed from weights at load (DoRA's norms) has other last bits elsewhere."""
    if config.compiled_dir is None:
        return None
    key = f"{base.fingerprint} {base.device.type} {sorted(map(str, base.sites.values()))} {sorted(base.refused)}"
    most = None if config.compiled_cache is None else int(config.compiled_cache * GIB)
    pinned = base.device.type == "cuda"
    return CompiledForms(Path(config.compiled_dir), key, base.dtype, pinned=pinned, most_bytes=most)


def host_budget(config: EngineConfig, device: str) -> int:
    """Bytes of the host tier. Without a number from the operator a share of the free memory: on a CPU a small one,
    since the device tier is in the same memory, and the file cache beside it."""
    if config.host_cache is not None:
        return int(config.host_cache * GIB)
    share, most = (_HOST_SHARE_CUDA, _MOST_CUDA) if device == "cuda" else (_HOST_SHARE_CPU, _MOST_CPU)
    return min(int(HostMemory.now().free * share), most)


def _compile(base: LoadedModel, path: Path, digest: str) -> AdapterProgram:
    return compile_folder(path, base, digest)
