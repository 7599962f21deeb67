"""Puts a loaded base behind its adapters: arena, tables, kernels, and every site wrapped."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from onebase.adapters.arena import Arena
from onebase.adapters.cache import AdapterCache
from onebase.adapters.formats import compile_folder
from onebase.adapters.program import AdapterProgram
from onebase.kernels.dispatch import select_kernels
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.tables import ProgramTables, SiteShape
from onebase.serve.engine.config import EngineConfig
from onebase.serve.model.loader import LoadedModel
from onebase.serve.model.sites import SiteContext, StepPlans, wrap_sites


def adapter_tier(
    config: EngineConfig, base: LoadedModel, arena: Arena, plans: StepPlans, instructions: InstructionTable
) -> AdapterCache:
    """The device tier over an arena. Once for a base: its modules' forwards are replaced."""
    sites = [entry.site for entry in base.probed]
    tables = ProgramTables(arena.buffer, [SiteShape(site.in_features, site.out_features) for site in sites])
    kernels = select_kernels(tables, "reference") if config.deterministic else select_kernels(tables)
    kernels.warm_up()
    context = SiteContext(kernels, tables, instructions, plans)
    wrap_sites(base.probed, base.norms, base.blocks, context)
    base.context.adapt(context, [layer.attention for layer in base.layers])
    index = {site.path: i for i, site in enumerate(sites)}
    return AdapterCache(arena, tables, kernels, instructions, index, partial(_compile, base))


def _compile(base: LoadedModel, path: Path, digest: str) -> AdapterProgram:
    return compile_folder(path, base, digest)
