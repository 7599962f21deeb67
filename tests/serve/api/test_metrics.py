"""GET /metrics: gateways' names, bounded labels, and no wait for the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from onebase.serve.metrics import MAX_MODEL_LABELS, Metrics


def samples(text: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def value(found: dict[str, list[Any]], name: str, **labels: str) -> float:
    (sample,) = [s for s in found[name] if labels.items() <= s.labels.items()]
    return float(sample.value)


def test_requests_tokens_and_latencies_are_counted(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.complete(prompt="xyz", max_tokens=5, n=2)
            await site.complete(model="nope")
            found = samples((await site.http.get("/metrics")).text)
            assert value(found, "onebase_request_generated_tokens_total", model="base") == 10
            assert value(found, "onebase_request_prompt_tokens_total", model="base") == len(site.encode("xyz"))
            assert value(found, "onebase_time_to_first_token_seconds_count") == 1
            assert value(found, "onebase_inter_token_latency_seconds_count") == 8
            assert value(found, "onebase_time_per_output_token_seconds_count") == 1
            assert value(found, "onebase_request_seconds_count") == 1
            assert value(found, "onebase_http_requests_total", route="/v1/completions", status="200") == 1
            assert value(found, "onebase_http_requests_total", route="/v1/completions", status="404") == 1
            assert not any("nope" in s.labels.values() for group in found.values() for s in group)

    run(body())


def test_gateway_names(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        folder = adapter_folder()
        async with open_site(adapter=(f"a={folder}", f"b={folder}")) as site:
            (digest,) = site.engine.stats.resident
            site.engine.stats = replace(
                site.engine.stats, running=3, waiting=2, waiting_for_adapter=1, free_pages=25, steps=9,
                waiting_adapters=(digest,), adapter_bytes_used=1 << 18,
                queried_tokens=50, cached_tokens=32, cached_pages=7, page_evictions=4,
            )  # fmt: skip
            site.engine.restarts = 2
            found = samples((await site.http.get("/metrics")).text)
            assert value(found, "vllm:num_requests_running") == 3
            assert value(found, "vllm:num_requests_waiting") == 2, "those for an adapter are among them"
            assert value(found, "onebase_requests_waiting_for_adapter") == 1
            assert value(found, "vllm:kv_cache_usage_perc") == 0.75
            assert value(found, "vllm:cache_config_info", block_size="16", num_gpu_blocks="100") == 1
            (lora,) = found["vllm:lora_requests_info"]
            assert lora.labels == {"max_lora": "4", "running_lora_adapters": "a,b", "waiting_lora_adapters": "a,b"}
            assert {s.labels["adapter_name"] for s in found["vllm:lora_adapter_loaded"]} == {"a", "b"}
            assert value(found, "vllm:prefix_cache_queries_total") == 50
            assert value(found, "vllm:prefix_cache_hits_total") == 32
            assert value(found, "onebase_cached_pages") == 7
            assert value(found, "onebase_page_evictions_total") == 4
            assert value(found, "onebase_engine_restarts_total") == 2
            assert value(found, "onebase_engine_ready") == 1
            site.engine.stats = replace(site.engine.stats, num_pages=50, adapter_bytes=1 << 19, budget_moves=6)
            found = samples((await site.http.get("/metrics")).text)
            assert value(found, "vllm:kv_cache_usage_perc") == 0.5, "of the pages that there are now"
            assert value(found, "vllm:cache_config_info", block_size="16", num_gpu_blocks="50") == 1
            assert value(found, "onebase_adapter_bytes_capacity") == 1 << 19
            assert value(found, "onebase_budget_moves_total") == 6
            assert found["vllm:lora_requests_info"][0].labels["max_lora"] == "2"

    run(body())


def test_exactly_one_lora_series_at_any_time(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for _ in range(2):
                found = samples((await site.http.get("/metrics")).text)
                assert len(found["vllm:lora_requests_info"]) == 1
            site.engine.ready = False
            assert value(samples((await site.http.get("/metrics")).text), "onebase_engine_ready") == 0

    run(body())


def test_labels_are_bounded(engine: Any) -> None:
    metrics = Metrics(engine, dict)
    for index in range(MAX_MODEL_LABELS * 3):
        metrics.generated(f"adapter-{index}").inc()
    found = samples(metrics.render()[0].decode())
    assert len(found["onebase_request_generated_tokens_total"]) == MAX_MODEL_LABELS + 1
    assert value(found, "onebase_request_generated_tokens_total", model="other") == MAX_MODEL_LABELS * 2


def test_two_servers_in_one_process_do_not_share(engine: Any) -> None:
    one, two = Metrics(engine, dict), Metrics(engine, dict)
    one.generated("a").inc()
    assert "onebase_request_generated_tokens_total" not in samples(two.render()[0].decode())


def test_unmatched_paths_share_one_label(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for index in range(5):
                await site.http.get(f"/nothing/{index}")
            found = samples((await site.http.get("/metrics")).text)
            assert value(found, "onebase_http_requests_total", route="unmatched", status="404") == 5

    run(body())
