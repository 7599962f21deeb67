"""What the engine says of itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from onebase.adapters.tiers.cache import AdapterCache
from onebase.serve.engine.budget import DeviceBudget
from onebase.serve.engine.messages import EngineStats
from onebase.serve.engine.scheduler import Scheduler
from onebase.serve.engine.tier_stats import tier_stats


@dataclass(slots=True)
class Counters:
    """Totals since the engine started. prompt_tokens: computed; generated_tokens: delivered; memory_failures: forwards
    for which there was no memory; drafted_tokens: computed as guesses; accepted_tokens: of them, those that were drawn
    and used."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    memory_failures: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


def engine_stats(scheduler: Scheduler, adapters: AdapterCache, budget: DeviceBudget, counters: Counters) -> EngineStats:
    """The figures of all parts, now."""
    resident = adapters.resident()
    waiting, pages = scheduler.waiting, scheduler.pages
    return EngineStats(
        running=len(scheduler.running),
        waiting=len(waiting),
        waiting_for_adapter=sum(n for uses, n in waiting.adapters.items() if not resident.keys() >= set(uses)),
        free_pages=pages.num_free,
        cached_pages=pages.num_idle,
        page_evictions=pages.num_evicted,
        steps=counters.steps,
        prompt_tokens=counters.prompt_tokens,
        queried_tokens=scheduler.queried_tokens,
        cached_tokens=scheduler.cached_tokens,
        generated_tokens=counters.generated_tokens,
        memory_failures=counters.memory_failures,
        drafted_tokens=counters.drafted_tokens,
        accepted_tokens=counters.accepted_tokens,
        preemptions=scheduler.preemptions,
        num_pages=pages.num_pages,
        adapter_bytes=adapters.arena.capacity_bytes,
        budget_moves=budget.moves,
        adapter_bytes_used=adapters.arena.used_bytes,
        adapter_loads=adapters.transit.loads,
        adapter_evictions=adapters.device.evictions,
        resident=resident,
        running_adapters=_distinct(sequence.digests for sequence in scheduler.running),
        waiting_adapters=_distinct(waiting.adapters),
        **tier_stats(adapters),
    )


def _distinct(adapters: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(chain.from_iterable(adapters)))
