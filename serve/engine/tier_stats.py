"""What the engine says of the tiers of adapters."""

from __future__ import annotations

from typing import TypedDict

from onebase.adapters.tiers.cache import AdapterCache
from onebase.serve.engine.messages import Seconds, TierStats


class TierFields(TypedDict):
    """Fields of EngineStats."""

    device: TierStats
    host: TierStats
    disk: TierStats
    load_seconds: dict[str, Seconds]
    pinned: tuple[str, ...]
    pinned_bytes: int
    pins_waiting: tuple[str, ...]
    compiled_failures: int


def tier_stats(adapters: AdapterCache) -> TierFields:
    """The figures of all tiers, now."""
    host, arena = adapters.host, adapters.arena
    pinned = tuple(digest for digest in adapters.pins.paths if adapters.is_ready(digest))
    there = frozenset(pinned)
    taken = {part: size for digest in pinned for part, size in adapters.parts(digest).items()}
    return TierFields(
        device=TierStats(
            bytes=arena.used_bytes,
            capacity=arena.capacity_bytes,
            adapters=len(adapters.device.entries),
            hits=adapters.hits,
            misses=adapters.misses,
            evictions=adapters.device.evictions,
        ),
        host=TierStats(host.used, host.capacity, len(host), host.hits, host.misses, host.evictions),
        disk=_disk(adapters),
        load_seconds={step: Seconds(*histogram) for step, histogram in adapters.transit.meters.histograms().items()},
        pinned=pinned,
        pinned_bytes=sum(taken.values()),
        pins_waiting=tuple(digest for digest in adapters.pins.paths if digest not in there),
        compiled_failures=0 if adapters.forms is None else adapters.forms.counts.failures,
    )


def _disk(adapters: AdapterCache) -> TierStats:
    if adapters.forms is None:
        return TierStats()
    adapters.survey()
    counts = adapters.forms.counts
    return TierStats(bytes=counts.nbytes, adapters=counts.files, hits=counts.hits, misses=counts.misses)
