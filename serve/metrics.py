"""Prometheus metrics: what the API side measures, and the engine's gauges read at scrape time.

The names that start with ``vllm:`` are those that gateways read to route by load and by resident adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from onebase.serve.engine.client import EngineClient
from onebase.serve.engine.messages import EngineInfo, EngineStats

MAX_MODEL_LABELS = 200
OTHER = "other"
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
WHOLE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)

Names = Mapping[str, tuple[str, ...]]


class Metrics:
    """One registry per server; nothing global. ``names`` gives digest -> adapter names without waiting."""

    def __init__(self, engine: EngineClient, names: Callable[[], Names]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, names))
        self._labels: set[str] = set()
        self._requests = self._counter("http_requests", "HTTP requests by route and status.", "route", "status")
        self._prompt = self._counter("request_prompt_tokens", "Prompt tokens of answered requests.", "model")
        self._generated = self._counter("request_generated_tokens", "Tokens sent to clients.", "model")
        self._first = self._histogram(
            "time_to_first_token_seconds", "From request to first token.", FIRST_TOKEN_BUCKETS
        )
        self._next = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice.", NEXT_TOKEN_BUCKETS
        )
        self._each = self._histogram(
            "time_per_output_token_seconds", "(Whole - first token) / (tokens - 1), per request.", NEXT_TOKEN_BUCKETS
        )
        self._whole = self._histogram("request_seconds", "From request to last token or class.", WHOLE_BUCKETS)

    def http_request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def first_token(self, model: str, seconds: float, prompt_tokens: int) -> None:
        self._first.observe(seconds)
        self._prompt.labels(self._label(model)).inc(prompt_tokens)

    def next_tokens(self, seconds: float, tokens: int) -> None:
        """Tokens that arrive together share the gap before them."""
        for _ in range(tokens):
            self._next.observe(seconds / tokens)

    def generated(self, model: str) -> Counter:
        """The counter of one model's tokens, looked up once for many increments."""
        return self._generated.labels(self._label(model))

    def finished(self, whole: float, first: float, tokens_of_longest: int) -> None:
        self._whole.observe(whole)
        if tokens_of_longest > 1:
            self._each.observe((whole - first) / (tokens_of_longest - 1))

    def classified(self, model: str, whole: float, prompt_tokens: int) -> None:
        self._prompt.labels(self._label(model)).inc(prompt_tokens)
        self._whole.observe(whole)

    def render(self) -> tuple[bytes, str]:
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def _label(self, model: str) -> str:
        """The first MAX_MODEL_LABELS names have a series of their own."""
        if model not in self._labels and len(self._labels) >= MAX_MODEL_LABELS:
            return OTHER
        self._labels.add(model)
        return model

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"onebase_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"onebase_{name}", text, buckets=buckets, registry=self.registry)


class RequestTimer:
    """Latencies of one request, whatever the number of its choices."""

    def __init__(self, metrics: Metrics, model: str, prompt_tokens: int, started: float) -> None:
        self._metrics = metrics
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._generated = metrics.generated(model)
        self._start = started
        self._first: float | None = None
        self._last: dict[int, float] = {}
        self._tokens: dict[int, int] = {}

    def tokens(self, choice: int, count: int) -> None:
        if not count:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now - self._start
            self._metrics.first_token(self._model, self._first, self._prompt_tokens)
        if choice in self._last:
            self._metrics.next_tokens(now - self._last[choice], count)
        self._last[choice] = now
        self._tokens[choice] = self._tokens.get(choice, 0) + count
        self._generated.inc(count)

    def finished(self) -> None:
        whole = time.monotonic() - self._start
        longest = max(self._tokens.values(), default=0)
        self._metrics.finished(whole, self._first or whole, longest)


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
    yield _counter(
        "onebase_budget_moves", "Times that pages and adapters took room from each other.", stats.budget_moves
    )


def _split(info: EngineInfo, stats: EngineStats) -> tuple[int, int]:
    """Pages, and bytes of adapters."""
    known = stats.num_pages > 0
    return (stats.num_pages, stats.adapter_bytes) if known else (info.num_pages, info.adapter_bytes)


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
    return max(1, len(stats.resident), int(_split(info, stats)[1] / mean))


def _named(names: Names, digests: Mapping[str, int] | tuple[str, ...]) -> list[str]:
    return sorted({name for digest in digests for name in names.get(digest, ())})


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
