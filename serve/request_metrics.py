"""What the API side measures of requests: by model where that can be told apart, over all where it need not be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from onebase.serve.engine.client import EngineClient
from onebase.serve.metric_labels import MAX_MODEL_LABELS, ModelLabels
from onebase.serve.metrics import EngineCollector, Names

FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
WHOLE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
READY = "ready"

States = Mapping[str, str]  # adapter name -> importing | failed


@dataclass(frozen=True, slots=True)
class ModelSeries:
    """The series of one model, looked up once. They may have left the registry, with their adapter, before the end."""

    prompt: Counter
    generated: Counter
    first: Histogram


class Metrics:
    """One registry per server; nothing global. Both callables answer from memory.

    names: digest -> names of adapters; states: of imports that are under way, or failed;
    base: the base model's name, which is no adapter's.
    """

    def __init__(
        self, engine: EngineClient, names: Callable[[], Names], states: Callable[[], States] = dict, base: str = ""
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, names))
        self._labels = ModelLabels()
        self._errors_of: dict[str, set[str]] = {}  # label -> kinds
        self.registry.register(StateCollector(self._labels, states, base))
        self._http = self._counter("http_requests", "HTTP requests by route and status.", "route", "status")
        self._requests = self._counter("requests", "Requests that named a model.", "model")
        self._errors = self._counter("request_errors", "Those that failed, by code.", "model", "kind")
        self._prompt = self._counter("request_prompt_tokens", "Prompt tokens of answered requests.", "model")
        self._generated = self._counter("request_generated_tokens", "Tokens sent to clients.", "model")
        self._first = self._histogram(
            "time_to_first_token_seconds", "From request to first token.", FIRST_TOKEN_BUCKETS, "model"
        )
        self._next = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice.", NEXT_TOKEN_BUCKETS
        )
        self._each = self._histogram(
            "time_per_output_token_seconds", "(Whole - first token) / (tokens - 1), per request.", NEXT_TOKEN_BUCKETS
        )
        self._whole = self._histogram("request_seconds", "From request to last token or class.", WHOLE_BUCKETS)

    def http_request(self, route: str, status: int) -> None:
        self._http.labels(route, str(status)).inc()

    def request(self, model: str) -> None:
        """A request whose model is known. Its label is taken here."""
        self._requests.labels(self._labels.take(model)).inc()

    def failed(self, model: str, kind: str) -> None:
        """kind: the code of the error. A model without a label, a deleted one too, takes none for it."""
        label = self._labels.of(model)
        self._errors_of.setdefault(label, set()).add(kind)
        self._errors.labels(label, kind).inc()

    def series(self, model: str) -> ModelSeries:
        label = self._labels.of(model)
        return ModelSeries(self._prompt.labels(label), self._generated.labels(label), self._first.labels(label))

    def next_tokens(self, seconds: float, tokens: int) -> None:
        """Tokens that arrive together share the gap before them."""
        for _ in range(tokens):
            self._next.observe(seconds / tokens)

    def finished(self, whole: float, first: float, tokens_of_longest: int) -> None:
        self._whole.observe(whole)
        if tokens_of_longest > 1:
            self._each.observe((whole - first) / (tokens_of_longest - 1))

    def classified(self, model: str, whole: float, prompt_tokens: int) -> None:
        self.series(model).prompt.inc(prompt_tokens)
        self._whole.observe(whole)

    def forget(self, adapter: str) -> None:
        """The adapter was deleted: its series go, and its label is free."""
        for label in self._labels.give_back(adapter):
            for metric in (self._requests, self._prompt, self._generated, self._first):
                metric.remove(label)
            for kind in self._errors_of.pop(label, ()):
                self._errors.remove(label, kind)

    def render(self) -> tuple[bytes, str]:
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"onebase_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"onebase_{name}", text, labels, buckets=buckets, registry=self.registry)


class RequestTimer:
    """Latencies of one request, whatever the number of its choices."""

    def __init__(self, metrics: Metrics, model: str, prompt_tokens: int, started: float) -> None:
        self._metrics = metrics
        self._series = metrics.series(model)
        self._prompt_tokens = prompt_tokens
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
            self._series.first.observe(self._first)
            self._series.prompt.inc(self._prompt_tokens)
        if choice in self._last:
            self._metrics.next_tokens(now - self._last[choice], count)
        self._last[choice] = now
        self._tokens[choice] = self._tokens.get(choice, 0) + count
        self._series.generated.inc(count)

    def finished(self) -> None:
        whole = time.monotonic() - self._start
        longest = max(self._tokens.values(), default=0)
        self._metrics.finished(whole, self._first or whole, longest)


class StateCollector(Collector):
    """The state of every adapter that has a label, and the imports of others that are under way or failed."""

    def __init__(self, labels: ModelLabels, states: Callable[[], States], base_name: str) -> None:
        self._labels = labels
        self._states = states
        self._base_name = base_name

    def describe(self) -> list[Metric]:
        """See EngineCollector."""
        return []

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("onebase_adapter_state", "1 for the state of an adapter.", labels=("model", "state"))
        adapters = [label for label in self._labels if label != self._base_name and "+" not in label]
        shown = dict.fromkeys(adapters, READY) | dict(self._states())
        for name in sorted(shown)[:MAX_MODEL_LABELS]:
            family.add_metric((name, shown[name]), 1)
        yield family
