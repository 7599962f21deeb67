"""The server's gauges over time, from /metrics: ours, vLLM's, SGLang's, llama.cpp's, TGI's and LoRAX's names."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping

import httpx

Row = Mapping[str, float]

# What a row calls it -> what servers call it. Series of one name that differ in their labels are summed up.
GAUGES = {
    "running": (
        "vllm:num_requests_running",
        "sglang:num_running_reqs",
        "llamacpp:requests_processing",
        "tgi_batch_current_size",
        "lorax_batch_current_size",
    ),
    "waiting": (
        "vllm:num_requests_waiting",
        "sglang:num_queue_reqs",
        "llamacpp:requests_deferred",
        "tgi_queue_size",
        "lorax_queue_size",
    ),
    "kv_cache_usage": ("vllm:kv_cache_usage_perc", "sglang:token_usage", "llamacpp:kv_cache_usage_ratio"),
    "generated_tokens": (
        "onebase_generated_tokens_total",
        "vllm:generation_tokens_total",
        "sglang:generation_tokens_total",
        "llamacpp:tokens_predicted_total",
    ),
    "prompt_tokens": (
        "onebase_prompt_tokens_total",
        "vllm:prompt_tokens_total",
        "sglang:prompt_tokens_total",
        "llamacpp:prompt_tokens_total",
    ),
    "prefix_cache_queries": ("vllm:prefix_cache_queries_total",),
    "prefix_cache_hits": ("vllm:prefix_cache_hits_total",),
    "preemptions": ("onebase_preemptions_total", "vllm:num_preemptions_total"),
    "waiting_for_adapter": ("onebase_requests_waiting_for_adapter",),
    "adapter_loads": ("onebase_adapter_loads_total",),
    "adapter_evictions": ("onebase_adapter_evictions_total",),
}
# By tier: rows call them ``tier_device_bytes``, ``tier_host_hits``, ``tier_disk_adapters``, ...
TIERS = ("device", "host", "disk")
TIER_GAUGES = {
    "bytes": "onebase_adapter_tier_bytes",
    "adapters": "onebase_adapter_tier_adapters",
    "hits": "onebase_adapter_tier_hits_total",
    "misses": "onebase_adapter_tier_misses_total",
    "evictions": "onebase_adapter_tier_evictions_total",
}
_ROWS = {name: row for row, names in GAUGES.items() for name in names} | {
    f'{name}{{tier="{tier}"}}': f"tier_{tier}_{row}" for row, name in TIER_GAUGES.items() for tier in TIERS
}


def parse(text: str) -> dict[str, float]:
    """Prometheus text -> the gauges known here. What is no number is left out."""
    row: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        key = _ROWS.get(name) or _ROWS.get(name.partition("{")[0])
        if key is None:
            continue
        try:
            number = float(value)
        except ValueError:
            continue
        if math.isfinite(number):
            row[key] = row.get(key, 0.0) + number
    return row


async def watch(client: httpx.AsyncClient, start: float, rows: list[Row], seconds: float = 1.0) -> None:
    """Append a row every ``seconds`` from ``start``, as time.perf_counter has it, until cancelled.

    Ends where the server has no metrics. A scrape that fails is left out.
    """
    while True:
        asked = time.perf_counter()
        try:
            answer = await client.get("/metrics")
        except httpx.HTTPError:
            answer = None
        if answer is not None:
            gauges = parse(answer.text) if answer.status_code == 200 else {}
            if not gauges:
                return
            rows.append({"t": asked - start, **gauges})
        await asyncio.sleep(max(0.0, asked + seconds - time.perf_counter()))
