"""The engine's gauges for Prometheus, read at scrape time from what it said last.

The names that start with ``vllm:`` are those that gateways read to route by load and by resident adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, islice

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from onebase.adapters.tiers.meters import LOAD_BUCKETS
from onebase.serve.engine.client import EngineClient
from onebase.serve.engine.messages import EngineInfo, EngineStats
from onebase.serve.metric_labels import MAX_MODEL_LABELS

Names = Mapping[str, tuple[str, ...]]  # digest -> adapter names


class EngineCollector(Collector):
    """The engine's latest gauges. Reads ``engine.stats`` and nothing that waits."""

    def __init__(self, engine: EngineClient, names: Callable[[], Names]) -> None:
        self._engine = engine
        self._names = names

    def describe(self) -> list[Metric]:
        """None: prometheus_client would collect once at registration to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats, info = self._engine.stats, self._engine.info
        yield _gauge("onebase_engine_ready", "1 where requests are served now.", float(self._engine.ready))
        yield _counter("onebase_engine_restarts", "Times the engine died and was started again.", self._engine.restarts)
        yield from _load(stats)
        yield from _tiers(stats)
        if info is not None:
            yield from _capacity(info, stats)
        yield from self._adapters(stats, info)

    def _adapters(self, stats: EngineStats, info: EngineInfo | None) -> Iterator[Metric]:
        names = self._names()
        running = _named(names, stats.resident)
        waiting = _named(names, stats.waiting_adapters)
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Resident and awaited adapters; the value is the time.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        room = str(_room(stats, info, registered=sum(map(len, names.values()))))
        lora.add_metric((room, ",".join(running), ",".join(waiting)), time.time())
        yield lora
        yield _loaded(names, self._engine)


def _load(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("vllm:num_requests_running", "Sequences in the batch.", stats.running)
    yield _gauge("vllm:num_requests_waiting", "Sequences that wait, those for an adapter included.", stats.waiting)
    yield _gauge(
        "onebase_requests_waiting_for_adapter", "Sequences whose adapter is loading.", stats.waiting_for_adapter
    )
    yield _counter("onebase_engine_steps", "Forward passes.", stats.steps)
    yield _counter("onebase_prompt_tokens", "Prompt tokens that went through the model.", stats.prompt_tokens)
    yield _counter("onebase_generated_tokens", "Tokens sampled.", stats.generated_tokens)
    yield _counter("onebase_memory_failures", "Forwards without memory, run again in parts.", stats.memory_failures)
    yield _counter("onebase_drafted_tokens", "Tokens computed as guesses of what comes.", stats.drafted_tokens)
    yield _counter("onebase_accepted_tokens", "Of them, those that were drawn and used.", stats.accepted_tokens)
    yield _counter("onebase_preemptions", "Sequences preempted for want of pages.", stats.preemptions)
    yield _counter("vllm:prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", stats.queried_tokens)
    yield _counter("vllm:prefix_cache_hits", "Prompt tokens that the prefix cache gave.", stats.cached_tokens)
    yield _gauge("onebase_cached_pages", "Free KV pages that the prefix cache can still give.", stats.cached_pages)
    yield _counter("onebase_page_evictions", "Cached KV pages given away for want of room.", stats.page_evictions)
    yield _counter("onebase_adapter_loads", "Adapters copied to the device.", stats.adapter_loads)
    yield _counter("onebase_adapter_evictions", "Adapters evicted from the device.", stats.adapter_evictions)


def _capacity(info: EngineInfo, stats: EngineStats) -> Iterator[Metric]:
    """Both sides of the device's budget as they are now; those of the start before the first step."""
    num_pages, adapter_bytes = _split(info, stats)
    used = 1 - stats.free_pages / num_pages if num_pages and stats.steps else 0.0
    yield _gauge("vllm:kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1.", used)
    yield _gauge("onebase_adapter_bytes_capacity", "Bytes of the device that adapters may take now.", adapter_bytes)
    yield _gauge("onebase_adapter_bytes_used", "Bytes of the device that adapters take.", stats.adapter_bytes_used)
    cache = GaugeMetricFamily(
        "vllm:cache_config_info", "Size of a page and number of pages now.", labels=("block_size", "num_gpu_blocks")
    )
    cache.add_metric((str(info.page_size), str(num_pages)), 1)
    yield cache
    memory = GaugeMetricFamily("onebase_memory_bytes", "The device's budget as planned at the start.", labels=("what",))
    for row in info.memory:
        memory.add_metric((row.what,), row.nbytes)
    yield memory
    yield _counter(
        "onebase_budget_moves", "Times that pages and adapters took room from each other.", stats.budget_moves
    )


def _split(info: EngineInfo, stats: EngineStats) -> tuple[int, int]:
    """Pages, and bytes of adapters."""
    known = stats.num_pages > 0
    return (stats.num_pages, stats.adapter_bytes) if known else (info.num_pages, info.adapter_bytes)


def _loaded(names: Names, engine: EngineClient) -> Metric:
    family = GaugeMetricFamily(
        "vllm:lora_adapter_loaded",
        "Adapters on the device and in host memory.",
        labels=("adapter_name", "level", "pinned"),
    )
    for name, level, pinned in islice(_levels(names, engine), MAX_MODEL_LABELS):
        family.add_metric((name, level, str(pinned).lower()), 1)
    return family


def _levels(names: Names, engine: EngineClient) -> Iterator[tuple[str, str, bool]]:
    """(name, tier, pinned) of what is loaded, the device first."""
    pinned = set(engine.stats.pinned)
    for level in ("device", "host"):
        digests = engine.stats.resident if level == "device" else names
        for digest in digests:
            if engine.tier(digest) == level:
                yield from ((name, level, digest in pinned) for name in names.get(digest, ()))


def _tiers(stats: EngineStats) -> Iterator[Metric]:
    """Every figure of every tier. The disk's are of compiled forms, and it has no capacity of its own."""
    tiers = {"device": stats.device, "host": stats.host, "disk": stats.disk}
    yield _by_tier(GaugeMetricFamily, "bytes", "Bytes of adapters.", {t: s.bytes for t, s in tiers.items()})
    capacity = {tier: one.capacity for tier, one in tiers.items() if tier != "disk"}
    yield _by_tier(GaugeMetricFamily, "capacity_bytes", "Bytes that adapters may take.", capacity)
    yield _by_tier(GaugeMetricFamily, "adapters", "Adapters that are there.", {t: s.adapters for t, s in tiers.items()})
    yield _by_tier(CounterMetricFamily, "hits", "Adapters looked for and found.", {t: s.hits for t, s in tiers.items()})
    misses = {tier: one.misses for tier, one in tiers.items()}
    yield _by_tier(CounterMetricFamily, "misses", "Adapters looked for and not found.", misses)
    evictions = {tier: one.evictions for tier, one in tiers.items() if tier != "disk"}
    yield _by_tier(CounterMetricFamily, "evictions", "Adapters that had to go for others.", evictions)
    yield _load_seconds(stats)
    yield _gauge("onebase_pinned_adapters", "Pinned adapters on the device.", len(stats.pinned))
    yield _gauge("onebase_pinned_adapter_bytes", "What they take there.", stats.pinned_bytes)
    yield _gauge(
        "onebase_pinned_adapters_waiting",
        "Pinned ones without room, or that cannot be loaded.",
        len(stats.pins_waiting),
    )
    yield _counter(
        "onebase_compiled_form_failures", "Compiled forms that were damaged or not written.", stats.compiled_failures
    )


def _by_tier(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, text: str, values: Mapping[str, int]
) -> Metric:
    family = kind(f"onebase_adapter_tier_{name}", text, labels=("tier",))
    for tier, value in values.items():
        family.add_metric((tier,), value)
    return family


def _load_seconds(stats: EngineStats) -> Metric:
    family = HistogramMetricFamily(
        "onebase_adapter_load_seconds",
        "Steps of a load: read (compiled form to host), compile (files to host), copy (to the device), wait (all).",
        labels=("step",),
    )
    bounds = [*map(str, LOAD_BUCKETS), "+Inf"]
    for step, seconds in sorted(stats.load_seconds.items()):
        buckets = list(zip(bounds, accumulate(seconds.counts), strict=True))
        family.add_metric((step,), buckets, sum_value=seconds.total)
    return family


def _room(stats: EngineStats, info: EngineInfo | None, registered: int) -> int:
    """Adapters that would fit at the mean size of the resident ones: there are no slots, gateways ask for a number."""
    if info is None or not stats.resident or not stats.adapter_bytes_used:
        return max(1, registered)
    mean = stats.adapter_bytes_used / len(stats.resident)
    return max(1, len(stats.resident), int(_split(info, stats)[1] / mean))


def _named(names: Names, digests: Mapping[str, int] | tuple[str, ...]) -> list[str]:
    return sorted({name for digest in digests for name in names.get(digest, ())})


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
