"""The engine's gauges, read at scrape time. What the API side measures is in metrics.py.

The names that start with ``vllm:`` are those that gateways read to route by load and by resident adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from onebase.serve.engine.client import EngineClient
from onebase.serve.engine.messages import EngineInfo, EngineStats
from onebase.serve.metric_labels import MAX_MODEL_LABELS

Names = Mapping[str, tuple[str, ...]]


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
        yield _loaded(names, stats)


def _load(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("vllm:num_requests_running", "Sequences in the batch.", stats.running)
    yield _gauge("vllm:num_requests_waiting", "Sequences that wait, those for an adapter included.", stats.waiting)
    yield _gauge(
        "onebase_requests_waiting_for_adapter", "Sequences whose adapter is loading.", stats.waiting_for_adapter
    )
    yield _counter("onebase_engine_steps", "Forward passes.", stats.steps)
    yield _counter("onebase_prompt_tokens", "Prompt tokens that went through the model.", stats.prompt_tokens)
    yield _counter("onebase_generated_tokens", "Tokens sampled.", stats.generated_tokens)
    yield _counter("onebase_preemptions", "Sequences preempted for want of pages.", stats.preemptions)
    yield _counter("vllm:prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", stats.queried_tokens)
    yield _counter("vllm:prefix_cache_hits", "Prompt tokens that the prefix cache gave.", stats.cached_tokens)
    yield _gauge("onebase_cached_pages", "Free KV pages that the prefix cache can still give.", stats.cached_pages)
    yield _counter("onebase_page_evictions", "Cached KV pages given away for want of room.", stats.page_evictions)
    yield _counter("onebase_adapter_loads", "Adapters copied to the device.", stats.adapter_loads)
    yield _counter("onebase_adapter_evictions", "Adapters evicted from the device.", stats.adapter_evictions)


def _capacity(info: EngineInfo, stats: EngineStats) -> Iterator[Metric]:
    used = 1 - stats.free_pages / info.num_pages if info.num_pages and stats.steps else 0.0
    yield _gauge("vllm:kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1.", used)
    yield _gauge("onebase_adapter_bytes_capacity", "Bytes of the device that adapters may take.", info.adapter_bytes)
    yield _gauge("onebase_adapter_bytes_used", "Bytes of the device that adapters take.", stats.adapter_bytes_used)
    cache = GaugeMetricFamily(
        "vllm:cache_config_info", "Size of a page and number of pages.", labels=("block_size", "num_gpu_blocks")
    )
    cache.add_metric((str(info.page_size), str(info.num_pages)), 1)
    yield cache


def _loaded(names: Names, stats: EngineStats) -> Metric:
    family = GaugeMetricFamily(
        "vllm:lora_adapter_loaded", "Adapters on the device.", labels=("adapter_name", "level", "pinned")
    )
    for name in _named(names, stats.resident)[:MAX_MODEL_LABELS]:
        family.add_metric((name, "device", "false"), 1)
    return family


def _room(stats: EngineStats, info: EngineInfo | None, registered: int) -> int:
    """Adapters that would fit at the mean size of the resident ones: there are no slots, gateways ask for a number."""
    if info is None or not stats.resident or not stats.adapter_bytes_used:
        return max(1, registered)
    mean = stats.adapter_bytes_used / len(stats.resident)
    return max(1, len(stats.resident), int(info.adapter_bytes / mean))


def _named(names: Names, digests: Mapping[str, int] | tuple[str, ...]) -> list[str]:
    return sorted({name for digest in digests for name in names.get(digest, ())})


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
