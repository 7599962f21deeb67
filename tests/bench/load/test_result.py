"""What a load run stores is read back as it was, and files that are none are refused by field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onebase.bench.load.result import ClientReport, LoadResult, RequestRecord, ResultError, ServerReport, read
from onebase.bench.load.slo import Slo
from onebase.bench.load.summary import summarise


def record(at: float = 0.0, **changes: Any) -> RequestRecord:
    """Four tokens: the first after 0.1 s, the others 20, 20 and 60 ms later."""
    shown: dict[str, Any] = {
        "at": at,
        "adapter": "a",
        "tenant": "",
        "tokens_in": 8,
        "tokens_out": 4,
        "sent": at,
        "first": at + 0.1,
        "ends": at + 0.2,
        "gaps": (0.02, 0.02, 0.06),
        "status": "ok",
    }
    return RequestRecord(**shown | changes)


def result(*records: RequestRecord) -> LoadResult:
    return LoadResult(
        machine={"device": "some"},
        server=ServerReport("http://localhost:1", "base"),
        workload={"rate": 2.0},
        seconds=10.0,
        requests=records,
        timeline=({"t": 0.5, "running": 3.0},),
        client=ClientReport(0.001, 0.002, 0.1),
        summary=summarise(records, Slo(), (0.0, 10.0)),
    )


GONE: dict[str, Any] = {"first": None, "ends": None, "gaps": (), "tokens_out": 0}


def test_a_result_is_read_back_as_it_was(tmp_path: Path) -> None:
    whole = result(record(), record(1.0, status="rejected", error="429", **GONE))
    path = tmp_path / "new" / "load.json"
    whole.write(path)
    assert read(path) == whole
    assert json.loads(path.read_text())["benchmark"] == "load"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"benchmark": "step"}, "benchmark: 'step'"),
        ({"format": 2}, "format: 2; this version reads 1"),
        ({"seconds": "long"}, "$.seconds"),
        ({"requests": [{"at": 1.0}]}, "$.requests[0]"),
        ({"requests": [{"status": "lost"}]}, "$.requests[0]"),
    ],
)
def test_other_files_are_refused_by_field(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    result(record()).write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ResultError) as refused:
        read(path)
    assert told in str(refused.value)
    assert str(path) in str(refused.value)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    path.write_text("<html>")
    with pytest.raises(ResultError):
        read(path)


@pytest.mark.parametrize(
    "change", [{"first": 0.3}, {"first": None}, {"gaps": (-0.1,)}, {"tokens_in": -1}, {"sent": 0.5}]
)
def test_records_that_contradict_themselves_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"order|neither|at least"):
        record(**change)


def test_latencies_are_those_of_the_literature() -> None:
    one = record()
    assert one.ttft == pytest.approx(0.1)
    assert one.e2e == pytest.approx(0.2)
    assert one.tpot == pytest.approx(0.1 / 3)
    assert record(tokens_out=1, ends=0.1, gaps=()).tpot is None
    assert record(status="cancelled").e2e is None


def test_percentiles_are_those_of_all_values() -> None:
    records = [record(first=i / 100, ends=i / 100 + 0.1) for i in range(1, 101)]
    ttft = summarise(records, Slo(), (0.0, 1.0)).ttft
    values = np.arange(1, 101) / 100
    assert ttft is not None
    assert ttft.mean == pytest.approx(values.mean())
    assert (ttft.p50, ttft.p99) == pytest.approx((np.percentile(values, 50), np.percentile(values, 99)))


def test_attainment_is_of_all_that_was_offered() -> None:
    records = [
        record(0.0),
        record(1.0, first=1.19),
        record(2.0, status="rejected", **GONE),
        record(3.0, status="failed", **GONE),
    ]
    summary = summarise(records, Slo.parse("ttft=150ms"), (0.0, 4.0))
    assert (summary.offered, summary.ok, summary.rejected, summary.failed) == (4, 2, 1, 1)
    assert summary.attainment == pytest.approx(1 / 4)
    assert summary.goodput == pytest.approx(1 / 4)
    assert summary.requests_per_second == pytest.approx(2 / 4)


def test_warm_up_and_tail_are_cut() -> None:
    records = [record(at) for at in (0.0, 1.0, 1.85, 3.0)]
    summary = summarise(records, Slo(), (1.0, 2.0))
    assert summary.offered == 2
    # All four tokens of the second, the first three of the third: 1.95, 1.97, 1.99, 2.05.
    assert summary.tokens_per_second == pytest.approx(4 + 3)


def test_adapters_and_tenants_have_measures_of_their_own() -> None:
    records = [record(0.0), record(1.0, adapter="b", tenant="t"), record(2.0, adapter="b")]
    summary = summarise(records, Slo(), (0.0, 10.0))
    assert {name: one.offered for name, one in summary.per_adapter.items()} == {"a": 1, "b": 2}
    assert {name: one.offered for name, one in summary.per_tenant.items()} == {"": 2, "t": 1}


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        ("", True),
        ("ttft=0.1", True),
        ("ttft=99ms", False),
        ("tpot=34ms", True),
        ("tpot=33ms", False),
        ("itl=59ms", False),
        ("itl=60ms,e2e=200ms", True),
        ("e2e=199999us", False),
    ],
)
def test_objectives_are_held_against_requests(slo: str, met: bool) -> None:
    exact = record(first=0.1, ends=0.2)
    assert Slo.parse(slo).met(exact) is met


@pytest.mark.parametrize("text", ["ttft", "ttft=-1", "ttft=6m", "speed=3", "ttft=1,ttft=2", "ttft=1e3"])
def test_objectives_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"slo: .*ttft, tpot, itl, e2e"):
        Slo.parse(text)


def test_no_requests_make_no_numbers() -> None:
    summary = summarise([], Slo(), (0.0, 0.0))
    assert summary.attainment == 0.0
    assert summary.ttft is None
    assert math.isfinite(summary.tokens_per_second)
