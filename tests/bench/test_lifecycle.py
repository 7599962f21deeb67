"""The lifecycle benchmark, end to end on a tiny shape: figures are there and add up, whatever they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onebase.bench.bed import Plan
from onebase.bench.lifecycle import SCENARIOS, run

PLAN = Plan(
    shape="tiny",
    registered=24,
    room=10,
    fit=8,
    rank=2,
    requests=8,
    clients=4,
    rounds=1,
    alphas=(1.0,),
    tokens_in=(4, 9),
    tokens_out=(2, 5),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "figures.json"
    run(PLAN, (), out)
    return dict(json.loads(out.read_text())["results"])


def test_every_scenario_reports_ratios(results: dict[str, Any]) -> None:
    assert results.keys() == SCENARIOS.keys()
    parts = [results["overcommit"]["alpha 1"], *(results[name] for name in ("beside-loads", "turns", "cold"))]
    for part in parts:
        assert part["ratios"]
        assert all(value > 0 for value in part["ratios"].values())


def test_the_side_without_pressure_loads_nothing_once_warm(results: dict[str, Any]) -> None:
    fits, over = results["overcommit"]["alpha 1"]["loads"].values()
    assert fits <= PLAN.fit
    assert over > 0


def test_a_scenario_can_be_picked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(PLAN, ("cold",), tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text())["results"].keys() == {"cold"}
    assert "cold / floor" in capsys.readouterr().out
