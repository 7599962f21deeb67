"""Tiers of adapters in /metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from onebase.adapters.tiers.meters import LOAD_BUCKETS, LoadMeters
from onebase.serve.engine.messages import EngineStats, Seconds, TierStats
from onebase.serve.metrics import MAX_MODEL_LABELS, Metrics


def _rendered(engine: Any, names: dict[str, tuple[str, ...]] | None = None) -> dict[tuple[str, ...], float]:
    """(name, label values) -> value."""
    text = Metrics(engine, lambda: names or {}).render()[0].decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def test_every_figure_of_every_tier(engine: Any) -> None:
    engine.stats = EngineStats(
        device=TierStats(1, 2, 3, 4, 5, 6), host=TierStats(11, 12, 13, 14, 15, 16), disk=TierStats(21, 0, 23, 24, 25)
    )
    found = _rendered(engine)
    figures = ("bytes", "capacity_bytes", "adapters", "hits_total", "misses_total", "evictions_total")
    for first, tier in ((1, "device"), (11, "host")):
        values = [found[f"onebase_adapter_tier_{figure}", tier] for figure in figures]
        assert values == list(range(first, first + 6))
    assert [found.get((f"onebase_adapter_tier_{figure}", "disk")) for figure in figures] == [21, None, 23, 24, 25, None]


def test_load_seconds_are_a_histogram(engine: Any) -> None:
    meters = LoadMeters()
    for seconds in (0.0005, 0.001, 0.0011, 99.0):
        meters.add("read", seconds)
    meters.add("copy", 0.3)
    engine.stats = EngineStats(load_seconds={step: Seconds(*h) for step, h in meters.histograms().items()})
    found = _rendered(engine)
    name = "onebase_adapter_load_seconds"
    assert found[f"{name}_bucket", "0.001", "read"] == 2
    assert found[f"{name}_bucket", "0.0025", "read"] == 3
    assert found[f"{name}_bucket", str(LOAD_BUCKETS[-1]), "read"] == 3
    assert found[f"{name}_bucket", "+Inf", "read"] == found[f"{name}_count", "read"] == 4
    assert abs(found[f"{name}_sum", "read"] - 99.0026) < 1e-9
    assert found[f"{name}_count", "copy"] == 1


def test_level_and_pinned_are_real(engine: Any) -> None:
    names = {"d1": ("a", "b"), "d2": ("c",), "d3": ("e",), "d4": ("f",)}
    engine.stats = EngineStats(resident={"d1": 5, "d2": 5}, pinned=("d2",), pinned_bytes=5, pins_waiting=("d9",))
    engine.tier = {"d1": "device", "d2": "device", "d3": "host", "d4": "disk"}.__getitem__
    found = _rendered(engine, names)
    loaded = {labels for name, *labels in found if name == "vllm:lora_adapter_loaded" for labels in [tuple(labels)]}
    assert loaded == {
        ("a", "device", "false"), ("b", "device", "false"), ("c", "device", "true"), ("e", "host", "false"),
    }  # fmt: skip
    assert found["onebase_pinned_adapters",] == 1
    assert found["onebase_pinned_adapter_bytes",] == 5
    assert found["onebase_pinned_adapters_waiting",] == 1


def test_names_are_bounded_and_the_device_comes_first(engine: Any) -> None:
    names = {f"d{n}": (f"n{n}",) for n in range(10 * MAX_MODEL_LABELS)}
    last = f"d{10 * MAX_MODEL_LABELS - 1}"
    engine.stats = replace(EngineStats(), resident={last: 1})
    engine.tier = lambda digest: "device" if digest == last else "host"
    loaded = [key for key in _rendered(engine, names) if key[0] == "vllm:lora_adapter_loaded"]
    assert len(loaded) == MAX_MODEL_LABELS
    assert sum(key[2] == "device" for key in loaded) == 1
