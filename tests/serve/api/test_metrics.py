"""GET /metrics: gateways' names, bounded labels, and no wait for the engine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from onebase.serve.metric_labels import MAX_COMBINED_LABELS, MAX_MODEL_LABELS
from onebase.serve.metrics import Metrics


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
        metrics.models.request(f"adapter-{index}")
        metrics.models.of(f"adapter-{index}").generated += 1
    found = samples(metrics.render()[0].decode())
    assert len(found["onebase_request_generated_tokens_total"]) == MAX_MODEL_LABELS + 1
    assert value(found, "onebase_request_generated_tokens_total", model="other") == MAX_MODEL_LABELS * 2


def test_a_deleted_adapter_gives_its_label_back(engine: Any) -> None:
    metrics = Metrics(engine, dict)
    for index in range(MAX_MODEL_LABELS):
        metrics.models.request(f"a{index}")
    metrics.models.request("late")
    metrics.models.failed("a0", "engine_dead")
    running = metrics.models.of("a0")
    metrics.models.forget("a0")
    running.generated += 1  # of a request that goes on: counted nowhere
    metrics.models.failed("a0", "engine_dead")
    found = samples(metrics.render()[0].decode())
    for group in found.values():
        assert not any(s.labels.get("model") == "a0" for s in group)
    assert value(found, "onebase_request_errors_total", model="other", kind="engine_dead") == 1
    assert value(found, "onebase_requests_total", model="other") == 1, "it came too late"
    metrics.models.request("new")
    metrics.models.request("newer")
    found = samples(metrics.render()[0].decode())
    assert value(found, "onebase_requests_total", model="new") == 1
    assert value(found, "onebase_requests_total", model="other") == 2
    assert len(found["onebase_requests_total"]) == MAX_MODEL_LABELS + 1


def test_combinations_go_with_each_of_their_adapters(engine: Any) -> None:
    metrics = Metrics(engine, dict)
    for model in ("a", "b", "a+b", "ab"):
        metrics.models.request(model)
    metrics.models.forget("b")
    found = samples(metrics.render()[0].decode())
    assert {s.labels["model"] for s in found["onebase_requests_total"]} == {"a", "ab"}


def test_combinations_leave_the_labels_of_models_alone(engine: Any) -> None:
    metrics = Metrics(engine, dict)
    for one in range(16):
        for two in range(one):
            metrics.models.request(f"a{one}+a{two}")
    for index in range(MAX_MODEL_LABELS):
        metrics.models.request(f"a{index}")
    found = samples(metrics.render()[0].decode())
    labels = {s.labels["model"] for s in found["onebase_requests_total"]}
    assert len([label for label in labels if "+" in label]) == MAX_COMBINED_LABELS
    assert labels > {f"a{index}" for index in range(MAX_MODEL_LABELS)}
    assert value(found, "onebase_requests_total", model="other") == 120 - MAX_COMBINED_LABELS


def test_a_set_of_adapters_counts_as_one_model(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for seed, name in enumerate("ab"):
                await site.upload(name, adapter_folder(name, seed))
            for model, other in ("ab", "ba"):
                adapters = [{"name": other, "scale": 1.0}]
                assert (await site.complete(model=model, adapters=adapters, max_tokens=1)).status_code == 200
            found = samples((await site.http.get("/metrics")).text)
            assert value(found, "onebase_requests_total", model="a+b") == 2

    run(body())


def test_states_that_are_not_ready_come_first(engine: Any) -> None:
    metrics = Metrics(engine, dict, lambda: {"zzz": "failed", "yyy": "importing"})
    for index in range(MAX_MODEL_LABELS):
        metrics.models.request(f"a{index}")
    states = samples(metrics.render()[0].decode())["onebase_adapter_state"]
    assert [(s.labels["model"], s.labels["state"]) for s in states[:2]] == [("yyy", "importing"), ("zzz", "failed")]
    assert len(states) == MAX_MODEL_LABELS


def test_an_adapter_called_other_takes_no_label(engine: Any) -> None:
    metrics = Metrics(engine, dict)
    metrics.models.request("other")
    metrics.models.forget("other")
    assert value(samples(metrics.render()[0].decode()), "onebase_requests_total", model="other") == 1


def test_errors_are_counted_by_model_and_kind(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        folder = adapter_folder()
        async with open_site(adapter=(f"a={folder}",)) as site:
            await site.complete(model="a", max_tokens=1)
            await site.complete(model="a", max_tokens=100_000)
            await site.complete(model="a", prompt=[])
            site.engine.die_after = 1
            await site.complete(model="a", max_tokens=3, stream=True)
            site.engine.ready = True
            site.engine.die_after, site.engine.failure = None, ValueError("unforeseen")
            assert (await site.complete(model="a")).status_code == 500
            found = samples((await site.http.get("/metrics")).text)
            kinds = {s.labels["kind"]: s.value for s in found["onebase_request_errors_total"]}
            assert kinds == {"context_length_exceeded": 1, "engine_dead": 1, "internal_error": 1}
            assert value(found, "onebase_requests_total", model="a") == 4, "a body that is refused names no model yet"
            assert value(found, "onebase_time_to_first_token_seconds_count", model="a") == 2
            assert value(found, "onebase_adapter_state", model="a", state="ready") == 1
            await site.http.delete("/v1/adapters/a")
            found = samples((await site.http.get("/metrics")).text)
            assert not any(s.labels.get("model") == "a" for group in found.values() for s in group)

    run(body())


def test_the_quick_text_is_what_prometheus_client_would_write(engine: Any) -> None:
    metrics = Metrics(engine, dict)
    for index, model in enumerate(("a", "b.c-d_e", 'quo"ted\\ and\nbroken', "a+b")):
        metrics.models.request(model)
        series = metrics.models.of(model)
        for seconds in (0.0, 0.005, 0.0051, index / 3, 59.9, 60.0, 1000.0):
            series.first_token(seconds, index)
        series.generated += index * 1000
        for kind in ("engine_dead", "client_closed", "engine_dead"):
            metrics.models.failed(model, kind)
    plain = CollectorRegistry()
    plain.register(metrics.models)

    def parsed(text: str) -> list[tuple[Any, ...]]:
        families = text_string_to_metric_families(text)
        return sorted(
            (family.name, family.type, family.documentation, sample.name, sorted(sample.labels.items()), sample.value)
            for family in families
            for sample in family.samples
        )

    assert parsed(metrics.models.text().decode()) == parsed(generate_latest(plain).decode())


def test_two_hundred_models_cost_a_scrape_little(engine: Any) -> None:
    metrics = Metrics(engine, dict)
    for index in range(MAX_MODEL_LABELS):
        metrics.models.request(f"adapter-{index}")
        metrics.models.of(f"adapter-{index}").first_token(0.1, 5)
        metrics.models.failed(f"adapter-{index}", "engine_dead")
    started = time.process_time()
    for _ in range(5):
        metrics.models.text()
    assert (time.process_time() - started) / 5 < 0.02


def test_two_servers_in_one_process_do_not_share(engine: Any) -> None:
    one, two = Metrics(engine, dict), Metrics(engine, dict)
    one.models.request("a")
    assert "onebase_requests_total" not in samples(two.render()[0].decode())


def test_unmatched_paths_share_one_label(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for index in range(5):
                await site.http.get(f"/nothing/{index}")
            found = samples((await site.http.get("/metrics")).text)
            assert value(found, "onebase_http_requests_total", route="unmatched", status="404") == 5

    run(body())
