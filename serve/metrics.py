"""Prometheus metrics: what the API side measures. The engine's gauges are in engine_metrics.py."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from onebase.serve.engine.client import EngineClient
from onebase.serve.engine_metrics import MAX_MODEL_LABELS, EngineCollector, Names

__all__ = ["MAX_MODEL_LABELS", "Metrics", "Names", "RequestTimer"]

OTHER = "other"
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
WHOLE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)


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
