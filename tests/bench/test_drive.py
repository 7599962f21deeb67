"""The driver of timed requests against a tiny engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onebase.bench.drive import Driver, Job, Run, Trace
from onebase.bench.ours import adapter_use
from onebase.bench.step import save_adapter
from onebase.serve.model.loader import load_model


@pytest.fixture(scope="module")
def driver(make_driver: Callable[..., Any]) -> Any:
    return make_driver("llama")


@pytest.fixture(scope="module")
def folder(driver: Any, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from onebase.serve.engine.config import EngineConfig

    base = load_model(EngineConfig(model=str(checkpoint("llama")), dtype="float32", device="cpu"))
    return save_adapter(base, tmp_path_factory.mktemp("adapters") / "one", 4, 0)


def job(at: float | None, tokens_out: int, folder: Path | None = None) -> Job:
    return Job(None if folder is None else adapter_use(folder), (5, 6, 7), tokens_out, at)


def test_every_job_gets_all_its_tokens_in_order_of_time(driver: Any, folder: Path) -> None:
    run = Driver(driver.engine, 2).run([job(0.05, 3), job(None, 4), job(None, 2, folder), job(None, 5)])
    assert sorted(len(trace.tokens) for trace in run.traces) == [2, 3, 4, 5]
    for trace in run.traces:
        assert trace.sent < trace.tokens[0] <= trace.tokens[-1]
        assert len(trace.gaps) == len(trace.tokens) - 1
    timed = next(trace for trace in run.traces if trace.job.at is not None)
    assert timed.sent - min(trace.sent for trace in run.traces) >= 0.04


def test_no_more_than_the_clients_run_at_once(driver: Any) -> None:
    run = Driver(driver.engine, 1).run([job(None, 3), job(None, 3)])
    first, second = run.traces
    assert second.sent >= first.tokens[-1]


def test_a_failing_job_is_an_error(driver: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No such file"):
        Driver(driver.engine, 1).run([job(None, 1, tmp_path / "nowhere")])


def test_figures_count_watched_jobs_only() -> None:
    watched = Trace(job(None, 3), 1.0, [1.5, 1.6, 1.8])
    other = Trace(Job(None, (1,), 1, watched=False), 0.0, [9.0])
    run = Run((watched, other), 2.0)
    assert run.tokens_per_second == pytest.approx(1.5)
    assert run.ttft(50) == pytest.approx(0.5)
    assert run.gap(100) == pytest.approx(0.2)
