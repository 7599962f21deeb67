"""What is counted by model. Hundreds of models make thousands of lines, and gateways read them many times a second.

So the text is written here, from plain numbers: prometheus_client would take the event loop for 60 ms each time. The
same numbers as its families (``collect``) are the plain twin.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from onebase.serve.metric_labels import ModelLabels

FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BOUNDS = (*map(floatToGoString, FIRST_TOKEN_BUCKETS), "+Inf")

_REQUESTS = ("onebase_requests", "Requests that named a model.")
_PROMPT = ("onebase_request_prompt_tokens", "Prompt tokens of answered requests.")
_GENERATED = ("onebase_request_generated_tokens", "Tokens sent to clients.")
_ERRORS = ("onebase_request_errors", "Requests that failed, by code.")
_FIRST = ("onebase_time_to_first_token_seconds", "From request to first token.")


@dataclass(slots=True)
class ModelSeries:
    """The numbers of one label. A request keeps its own: after its adapter's deletion they are in no answer.

    first: requests by the bucket of their first token, not yet summed up.
    """

    label: str
    requests: int = 0
    prompt: int = 0
    generated: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    first: list[int] = field(default_factory=lambda: [0] * len(_BOUNDS))
    first_seconds: float = 0.0

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        self.first[bisect_left(FIRST_TOKEN_BUCKETS, seconds)] += 1
        self.first_seconds += seconds
        self.prompt += prompt_tokens

    def buckets(self) -> list[int]:
        """How many first tokens took no longer than each bound."""
        return list(accumulate(self.first))


class ModelMetrics(Collector):
    """Series by label: a model's own, or ``other``. Used from the event loop alone."""

    def __init__(self) -> None:
        self.labels = ModelLabels()
        self._series: dict[str, ModelSeries] = {}

    def request(self, model: str) -> None:
        """A request whose model is known. Its label is taken here."""
        self._at(self.labels.take(model)).requests += 1

    def failed(self, model: str, kind: str) -> None:
        """kind: the code of the error. A model without a label, a deleted one too, takes none for it."""
        errors = self.of(model).errors
        errors[kind] = errors.get(kind, 0) + 1

    def of(self, model: str) -> ModelSeries:
        return self._at(self.labels.of(model))

    def forget(self, adapter: str) -> None:
        """The adapter was deleted: its series go, and its label is free."""
        for label in self.labels.give_back(adapter):
            self._series.pop(label, None)

    def text(self) -> bytes:
        """As generate_latest would write what ``collect`` yields."""
        return "".join(self._lines()).encode()

    def collect(self) -> Iterator[Metric]:
        for (name, text), values in (
            (_REQUESTS, {one.label: one.requests for one in self._all()}),
            (_PROMPT, {one.label: one.prompt for one in self._all()}),
            (_GENERATED, {one.label: one.generated for one in self._all()}),
        ):
            counter = CounterMetricFamily(name, text, labels=("model",))
            for label, value in values.items():
                counter.add_metric((label,), value)
            yield counter
        errors = CounterMetricFamily(*_ERRORS, labels=("model", "kind"))
        first = HistogramMetricFamily(*_FIRST, labels=("model",))
        for one in self._all():
            for kind, count in one.errors.items():
                errors.add_metric((one.label, kind), count)
            first.add_metric((one.label,), list(zip(_BOUNDS, one.buckets(), strict=True)), one.first_seconds)
        yield errors
        yield first

    def _at(self, label: str) -> ModelSeries:
        if label not in self._series:
            self._series[label] = ModelSeries(label)
        return self._series[label]

    def _all(self) -> list[ModelSeries]:
        return list(self._series.values())

    def _lines(self) -> Iterator[str]:
        named = [(f'model="{_escaped(one.label)}"', one) for one in self._all()]
        yield _head(*_REQUESTS, "counter")
        yield from (f"onebase_requests_total{{{model}}} {one.requests}\n" for model, one in named)
        yield _head(*_PROMPT, "counter")
        yield from (f"onebase_request_prompt_tokens_total{{{model}}} {one.prompt}\n" for model, one in named)
        yield _head(*_GENERATED, "counter")
        yield from (f"onebase_request_generated_tokens_total{{{model}}} {one.generated}\n" for model, one in named)
        yield _head(*_ERRORS, "counter")
        for model, one in named:
            for kind, count in one.errors.items():
                yield f'onebase_request_errors_total{{{model},kind="{kind}"}} {count}\n'
        yield _head(*_FIRST, "histogram")
        for model, one in named:
            yield from _histogram(model, one)


def _histogram(model: str, one: ModelSeries) -> Iterator[str]:
    name, counts = _FIRST[0], one.buckets()
    for bound, count in zip(_BOUNDS, counts, strict=True):
        yield f'{name}_bucket{{{model},le="{bound}"}} {count}\n'
    yield f"{name}_count{{{model}}} {counts[-1]}\n{name}_sum{{{model}}} {one.first_seconds}\n"


def _head(name: str, text: str, kind: str) -> str:
    full = f"{name}_total" if kind == "counter" else name
    return f"# HELP {full} {text}\n# TYPE {full} {kind}\n"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
