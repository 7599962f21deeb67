"""The kernel benchmark: its sides do the same work, its floor is the formula, its files can be read."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from onebase.bench import kernels, kernels_decode
from onebase.bench.kernels import run
from onebase.bench.kernels_case import MIXED, Case, World, cases
from onebase.bench.kernels_sides import DENSE, GROUPED, LOOP, OURS, SERVED, sides
from onebase.kernels.dispatch import select_kernels

from .matmul_worlds import needs_interpreter

CPU = torch.device("cpu")
SMALL = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)


def test_the_floor_is_the_formula() -> None:
    case = Case(hidden=128, rank=8, rows=6, programs=3)
    assert case.floor_bytes(2) == 2 * (6 * 128 + 3 * 8 * 256 + 2 * 6 * 8 + 2 * 6 * 128)


def test_mixed_ranks_count_as_what_they_are() -> None:
    case = Case(hidden=64, rank=MIXED, rows=7, programs=7)
    assert case.ranks == (8, 16, 32, 64, 128, 8, 16)
    assert case.floor_bytes(4) == 4 * (7 * 64 + sum(case.ranks) * 128 + 2 * sum(case.ranks) + 2 * 7 * 64)


def test_the_grid_has_every_case_once_and_every_row_a_program() -> None:
    grid = list(cases((64,), (8,), (1, 5, 16), ("one", "half", "all")))
    assert [(case.rows, case.programs) for case in grid] == [(1, 1), (5, 1), (5, 2), (5, 5), (16, 1), (16, 8), (16, 16)]
    assert all(sum(case.lengths) == case.rows and min(case.lengths) > 0 for case in grid)


@pytest.mark.parametrize("case", [Case(64, 8, 5, 5), Case(64, MIXED, 12, 5), Case(128, 16, 16, 1)], ids=str)
def test_all_sides_compute_the_same(case: Case) -> None:
    world = World(case, torch.float32, CPU, cold_bytes=1 << 18)
    found = dict(sides(world, select_kernels(world.tables, "reference")))
    found.pop(DENSE)
    assert len(found) >= 3
    results = {}
    for name, side in found.items():
        world.y.zero_()
        side()
        results[name] = world.y.clone()
    assert results[OURS].abs().max() > 0.01
    for name, y in results.items():
        torch.testing.assert_close(y, results[OURS], rtol=1e-4, atol=1e-4, msg=name)


@needs_interpreter
@pytest.mark.parametrize("case", [Case(64, MIXED, 5, 5), Case(64, 16, 8, 2)], ids=str)
def test_what_is_captured_computes_the_same(case: Case) -> None:
    world = World(case, torch.float32, CPU, cold_bytes=1 << 16)
    found = sides(world, select_kernels(world.tables, "triton"))
    results = []
    for name in (OURS, SERVED, LOOP):
        world.y.zero_()
        found[name]()
        results.append(world.y.clone())
    for y in results[:2]:
        torch.testing.assert_close(y, results[2], rtol=1e-4, atol=1e-4)
    long = World(Case(64, 16, 8, 1), torch.float32, CPU, cold_bytes=1 << 16)
    assert SERVED not in sides(long, select_kernels(long.tables, "triton"))


def test_cases_that_do_not_fit_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_MOST_BYTES", {"cpu": 1 << 16})
    results = run("cpu", hidden=(64,), ranks=(8, 64), rows=(16,), shares=("all",), rounds=1, out=tmp_path / "k.json")
    assert [result["rank"] for result in results] == [8]
    assert json.loads((tmp_path / "k.json").read_text())["left_out"] == [asdict(Case(64, 64, 16, 16))]
    assert "left out" in capsys.readouterr().out


def test_a_run_stores_what_it_shows(tmp_path: Path) -> None:
    results = run(
        "cpu", hidden=(64,), ranks=(8, MIXED), rows=(4,), rounds=1, out=tmp_path / "k.json", table=tmp_path / "k.csv"
    )
    assert len(results) == 6
    stored = json.loads((tmp_path / "k.json").read_text())
    assert stored["results"] == json.loads(json.dumps(results))
    with (tmp_path / "k.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ours, us"]) for row in rows] == [round(1e6 * r["seconds"][OURS], 3) for r in results]
    for result in results:
        spent = result["floor_bytes"] / result["seconds"][OURS]
        assert result["share_of_copy_bandwidth"] == pytest.approx(spent / stored["copy_bytes_per_second"])


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run("cpu", hidden=(64, 96), ranks=(8,), rows=(4,), rounds=1, plot=tmp_path / "k.png")
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")


def test_grouped_mm_is_among_the_sides_where_torch_has_it() -> None:
    world = World(Case(64, 8, 4, 4), torch.bfloat16, CPU, cold_bytes=1)
    has = hasattr(torch.nn.functional, "grouped_mm")
    assert (GROUPED in sides(world, select_kernels(world.tables, "reference"))) == has


def test_it_imports_without_the_server_and_the_command_line() -> None:
    blocked = ("fastapi", "msgspec", "zmq", "typer", "pydantic", "uvicorn", "matplotlib")
    program = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import onebase.bench.kernels"
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False, timeout=120).returncode == 0


def test_decode_steps_are_measured_beside_floor_and_under_churn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a shape that is small enough to be quick; every program has its slot, and none is left behind."""
    monkeypatch.setitem(kernels_decode.SHAPES, "135m", SMALL)
    result = kernels_decode.run(rows=4, steps=8, out=tmp_path / "d.json")
    assert json.loads((tmp_path / "d.json").read_text())["floor"] == result["floor"]
    assert result["floor"]["ours / floor"] > 0
    assert len(result["churn"]) == 4
    assert all(p50 <= p99 for p50, p99, _ in result["churn"].values())


def test_a_step_of_the_decode_benchmark_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels_decode.SHAPES, "135m", SMALL)
    decoding = kernels_decode.Decoding("135m", 6)
    for rank in (8, 16, 32):
        decoding.join(rank)
    decoding.leave(1, select_kernels(decoding.tables, "reference"))
    decoding.join(64)
    assert decoding.live == [0, 2, 3]
    assert [len(group) for group in decoding.groups] == [3, 1, 2, 1] * 2
    widths = sum(site.in_features + site.out_features for site in decoding.tables.sites)
    assert decoding.factor_bytes == 2 * widths * (8 + 32 + 64)
    kept = {width: rows.clone() for width, rows in decoding.rows.items()}
    decoding.step(select_kernels(decoding.tables, "reference"), decoding.plan)
    wanted, decoding.rows = decoding.rows, kept
    decoding.step(select_kernels(decoding.tables), decoding.plan)
    for width, rows in wanted.items():
        torch.testing.assert_close(decoding.rows[width], rows, rtol=0.05, atol=0.05)
