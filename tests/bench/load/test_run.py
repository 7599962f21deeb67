"""Whole runs: client processes against a server that only keeps time, and against the real one with adapters."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from os import getpid, kill
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from onebase.bench.cli import app
from onebase.bench.http_server import save_model, serving
from onebase.bench.load.capacity import stub
from onebase.bench.load.options import Options
from onebase.bench.load.result import read
from onebase.bench.load.run import run
from onebase.bench.load.timeline import Row
from onebase.bench.load.worker import Progress
from onebase.bench.load.workload import Workload
from onebase.bench.workload import random_model, save_adapters


@pytest.fixture(scope="module")
def clock() -> Iterator[str]:
    with stub(0.01, 0.001) as url:
        yield url


def command(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["load", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_all_processes_send_their_share_and_the_report_is_beside_the_result(clock: str, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text('[[tenant]]\nname = "a"\nkey = "k"\n[[tenant]]\nname = "b"\nkey = "l"\nshare = 3\n')
    out = tmp_path / "load.json"
    options = ["--processes", "2", "--tenants", str(tenants), "--slo", "e2e=60s", "--cancel", "0.2", "--out", str(out)]
    command("--url", clock, "--rate", "100", "--seconds", "1", "--tokens-out", "9", *options)
    result = read(out)
    summary = result.summary
    assert (summary.offered, summary.rejected, summary.failed) == (100, 0, 0)
    assert summary.ok + summary.cancelled == 100
    assert summary.cancelled > 0
    assert summary.attainment == 1.0
    assert sum(one.offered for one in summary.per_tenant.values()) == 100
    assert summary.per_tenant["b"].offered > summary.per_tenant["a"].offered
    assert result.client.processes == 2
    assert "'k'" not in out.read_text().replace('"', "'")
    assert out.with_suffix(".html").stat().st_size > 1000
    assert out.with_suffix(".md").exists()


def test_closed_loops_have_as_many_under_way_as_clients(clock: str, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    command("--url", clock, "--clients", "5", "--requests", "30", "--tokens-out", "4", "--out", str(out))
    records = read(out).requests
    assert len(records) == 30
    events = sorted([(one.sent, 1) for one in records] + [(one.ends or 0.0, -1) for one in records])
    under_way = most = 0
    for _, change in events:
        under_way += change
        most = max(most, under_way)
    assert 1 < most <= 5


def test_an_interrupt_keeps_what_came_until_then(clock: str) -> None:
    class Interrupts:
        def update(self, seconds: float, progress: Progress, gauges: Row) -> None:
            if progress.ok:
                kill(getpid(), signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    workload = Workload(rate=20.0, seconds=600.0, tokens_out="2")
    result = asyncio.run(run(Options(clock, workload, model="base"), Interrupts(), {}))
    assert 0 < len(result.requests) < 12_000


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--url", "nowhere"], "url"),
        (["--url", "http://h", "--slo", "fast"], "slo"),
        (["--url", "http://h", "--popularity", "often"], "popularity"),
        (["--url", "http://h", "--endpoint", "images"], "endpoint"),
        (["--url", "http://h", "--churn-folder", "/nowhere"], "churn"),
        (["--url", "http://h", "--tenants", "/nowhere.toml"], "nowhere"),
        (["--url", "http://h", "--clients", "3"], "clients and requests"),
        (["--url", "http://127.0.0.1:1"], "url"),
    ],
)
def test_what_cannot_be_run_is_said_without_a_traceback(arguments: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["load", *arguments])
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit)
    assert told in done.output


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_real_server_with_adapters_that_change(tmp_path: Path) -> None:
    model = random_model("tiny", torch.float32, "cpu")
    folders = save_adapters(model, tmp_path / "adapters", [8, 16, 8])
    served = {folder.name: folder for folder in folders}
    options = ["--device", "cpu", "--kv-memory", "0.05", "--adapter-memory", "0.05"]
    out = tmp_path / "load.json"
    with serving(save_model(model, tmp_path / "model"), served, options, tmp_path / "data") as server:
        url = f"http://{server.host}:{server.port}"
        churn = ["--churn", "3", "--churn-folder", str(folders[0]), "--popularity", "power:0.3"]
        command(
            "--url",
            url,
            "--rate",
            "5",
            "--seconds",
            "4",
            "--tokens-in",
            "8:17",
            "--tokens-out",
            "4",
            *churn,
            "--out",
            str(out),
        )
    result = read(out)
    assert result.summary.failed == result.summary.rejected == 0
    assert result.summary.per_adapter.keys() <= served.keys()
    assert {record.tokens_out for record in result.requests} == {4}
    assert {record.tokens_in for record in result.requests} <= set(range(8, 17))
    done = Counter((change.action, change.error is None) for change in result.churn)
    assert done["upload", True]
    assert done["replace", True]
    assert not [change for change in result.churn if change.error and change.action != "unload"]
    assert {"running", "waiting", "kv_cache_usage", "tier_device_adapters"} <= result.timeline[-1].keys()
    assert result.server.version is not None
