"""What the API side measures of requests: by model where that can be told apart, over all where it need not be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from onebase.serve.engine.client import EngineClient
from onebase.serve.engine_metrics import EngineCollector, Names
from onebase.serve.metric_labels import MAX_MODEL_LABELS, ModelLabels, is_combined
from onebase.serve.model_metrics import ModelMetrics
from onebase.serve.tenant_metrics import TenantMetrics

NEXT_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
WHOLE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
READY = "ready"

States = Mapping[str, str]  # adapter name -> importing | failed


class Metrics:
    """One registry per server; nothing global. Both callables answer from memory.

    names: digest -> names of adapters; states: of imports that are under way, or failed; base: the base model's name,
    which is no adapter's.
    """

    def __init__(
        self, engine: EngineClient, names: Callable[[], Names], states: Callable[[], States] = dict, base: str = ""
    ) -> None:
        self.models = ModelMetrics()
        self._rest = CollectorRegistry()
        self.tenants = TenantMetrics(self._rest)
        self._rest.register(EngineCollector(engine, names))
        self._rest.register(StateCollector(self.models.labels, states, base))
        self._http = Counter(
            "onebase_http_requests", "HTTP requests by route and status.", ("route", "status"), registry=self._rest
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

    def next_tokens(self, seconds: float, tokens: int) -> None:
        """Tokens that arrive together share the gap before them."""
        for _ in range(tokens):
            self._next.observe(seconds / tokens)

    def finished(self, whole: float, first: float, tokens_of_longest: int) -> None:
        self._whole.observe(whole)
        if tokens_of_longest > 1:
            self._each.observe((whole - first) / (tokens_of_longest - 1))

    def classified(self, model: str, whole: float, prompt_tokens: int) -> None:
        self.models.of(model).prompt += prompt_tokens
        self._whole.observe(whole)

    def families(self) -> list[Metric]:
        """All that is served, as prometheus_client has it."""
        return [*self._rest.collect(), *self.models.collect()]

    def render(self) -> tuple[bytes, str]:
        return generate_latest(self._rest) + self.models.text(), CONTENT_TYPE_PLAIN_0_0_4

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"onebase_{name}", text, buckets=buckets, registry=self._rest)


class RequestTimer:
    """Latencies of one request, whatever the number of its choices."""

    def __init__(self, metrics: Metrics, model: str, prompt_tokens: int, started: float) -> None:
        self._metrics = metrics
        self._series = metrics.models.of(model)
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
            self._series.first_token(self._first, self._prompt_tokens)
        if choice in self._last:
            self._metrics.next_tokens(now - self._last[choice], count)
        self._last[choice] = now
        self._tokens[choice] = self._tokens.get(choice, 0) + count
        self._series.generated += count

    def finished(self) -> None:
        whole = time.monotonic() - self._start
        longest = max(self._tokens.values(), default=0)
        self._metrics.finished(whole, self._first or whole, longest)


class StateCollector(Collector):
    """The state of every adapter that has a label, and the imports of others that are under way or failed.

    At most MAX_MODEL_LABELS of them; those that are not ready come first.
    """

    def __init__(self, labels: ModelLabels, states: Callable[[], States], base: str) -> None:
        self._labels = labels
        self._states = states
        self._base = base

    def describe(self) -> list[Metric]:
        """See EngineCollector."""
        return []

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("onebase_adapter_state", "1 for the state of an adapter.", labels=("model", "state"))
        adapters = [label for label in self._labels if label != self._base and not is_combined(label)]
        shown = dict.fromkeys(adapters, READY) | dict(self._states())
        for name in sorted(shown, key=lambda name: (shown[name] == READY, name))[:MAX_MODEL_LABELS]:
            family.add_metric((name, shown[name]), 1)
        yield family
