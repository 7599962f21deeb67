"""What tenants use, for Prometheus. Tenants are the operator's: as many series as are named in the file of keys."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter

UNNAMED = "none"  # label of requests without a tenant's key


class Used(Protocol):
    """What one request used, in tokens; each prompt counts once, whatever the number of its choices."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class TenantMetrics:
    """Counted when a request has ended, however it ended."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"onebase_tenant_{name}", text, ("tenant",), registry=registry)

        self._requests = counter("requests", "Requests that reached the engine, by tenant.")
        self._prompt = counter("prompt_tokens", "Tokens of their prompts.")
        self._cached = counter("cached_tokens", "Those of them that the prefix cache gave.")
        self._generated = counter("generated_tokens", "Tokens sent to them.")

    def used(self, tenant: str, usage: Used) -> None:
        label = tenant or UNNAMED
        self._requests.labels(label).inc()
        self._prompt.labels(label).inc(usage.prompt_tokens)
        self._cached.labels(label).inc(usage.cached_tokens)
        self._generated.labels(label).inc(usage.completion_tokens)
