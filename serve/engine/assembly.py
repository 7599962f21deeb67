"""Puts an engine together: one buffer for pages and adapters, their books, the runner over the base."""

from __future__ import annotations

from dataclasses import dataclass

from onebase.adapters.tiers.cache import AdapterCache
from onebase.kernels.instructions import InstructionTable
from onebase.serve.engine.budget import DeviceBudget
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.deterministic import SCRATCH_PAGES, DeterministicRunner
from onebase.serve.engine.fairness import Fairness
from onebase.serve.engine.graph_recorder import CudaRecorder, Recorder
from onebase.serve.engine.graphs import MOST_ROWS, DecodeGraphs, Room, bucket
from onebase.serve.engine.memory import MemoryPlan, allocate, arena_in, plan_memory
from onebase.serve.engine.messages import EngineInfo
from onebase.serve.engine.pace import Pace
from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.prefix_cache import PrefixCache
from onebase.serve.engine.runner import ModelRunner
from onebase.serve.engine.scheduler import Scheduler
from onebase.serve.engine.tier import adapter_tier
from onebase.serve.engine.usage import measure
from onebase.serve.engine.waiting import WaitingRoom
from onebase.serve.model.loader import LoadedModel
from onebase.serve.model.site_context import StepPlans


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What an engine is made of."""

    scheduler: Scheduler
    adapters: AdapterCache
    waiting: WaitingRoom
    budget: DeviceBudget
    runner: ModelRunner
    info: EngineInfo


def assemble(config: EngineConfig, base: LoadedModel) -> Parts:
    """Once for a base: its modules' forwards are replaced. Raises ModelRejected where the memory does not do."""
    memory = plan_memory(config, base, measure(config, base))
    scratch = SCRATCH_PAGES if config.deterministic else 1
    buffer = allocate(memory, base.device, scratch)
    base.context.lie_in(buffer, memory.num_slots + scratch)
    base.context.warm_up()
    scheduler = _scheduler(config, memory)
    plans, instructions = StepPlans(), InstructionTable()
    adapters = adapter_tier(config, base, arena_in(buffer, memory, base.dtype), plans, instructions)
    scheduler.ready = adapters.ready
    pad, lookahead = base.config.get("pad_token_id"), 2 * config.max_num_seqs
    waiting = WaitingRoom(scheduler, adapters, memory.max_model_len, pad, lookahead)
    budget = DeviceBudget(memory, scheduler, adapters, base.context.move_pages, waiting)
    runner = (
        DeterministicRunner(base, plans, instructions, memory.num_slots, memory.max_model_len)
        if config.deterministic
        else ModelRunner(base, plans, instructions)
    )
    if config.cuda_graphs and base.device.type == "cuda" and not config.deterministic:
        use_graphs(runner, base, config.max_num_seqs, memory, CudaRecorder(base.device))
    return Parts(scheduler, adapters, waiting, budget, runner, _info(config, base, memory, adapters))


def use_graphs(
    runner: ModelRunner, base: LoadedModel, max_num_seqs: int, memory: MemoryPlan, recorder: Recorder
) -> None:
    """Let the runner replay decode steps, where the bodies of attention and low rank can be captured."""
    sites = base.context.sites
    if sites is None or sites.kernels.name != "triton" or not base.context.body.is_capturable:
        return
    rows = min(bucket(max_num_seqs), MOST_ROWS)
    room = Room(rows, memory.max_model_len, base.context.page_size, memory.num_slots, base.device)
    runner.use_graphs(lambda forward: DecodeGraphs(forward, recorder, sites.tables, sites.instructions, room))


def _scheduler(config: EngineConfig, memory: MemoryPlan) -> Scheduler:
    cache = PrefixCache() if config.prefix_caching else None
    pages = PageAllocator(memory.pages.start, config.page_size, cache, first=memory.first_page)
    fairness, pace = Fairness(dict(config.tenant_weights)), Pace(config.max_step_stretch)
    return Scheduler(pages, config.max_batch_tokens, config.max_num_seqs, fairness, pace)


def _info(config: EngineConfig, base: LoadedModel, memory: MemoryPlan, adapters: AdapterCache) -> EngineInfo:
    return EngineInfo(
        architecture=type(base.model).__name__,
        fingerprint=base.fingerprint,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        vocab_size=base.vocab_size,
        max_model_len=memory.max_model_len,
        page_size=config.page_size,
        num_pages=memory.pages.start,
        adapter_bytes=adapters.arena.capacity_bytes,
        eos_token_ids=base.eos_token_ids,
        page_bounds=(memory.pages.least, memory.pages.most),
        adapter_byte_bounds=(memory.adapters.least, memory.adapters.most),
        memory=memory.rows(),
    )
