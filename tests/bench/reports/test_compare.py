"""Comparisons: differences are found where there are some, and seldom where there are none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from onebase.bench.cli import app
from onebase.bench.reports import noise
from onebase.bench.reports.compare import compare
from onebase.bench.reports.figures import Figure, figures
from onebase.bench.reports.stored import NotStored, Stored, read
from onebase.bench.reports.verdict import row_of_figures

from .conftest import MakeRun


def stored(benchmark: str, data: Mapping[str, Any]) -> Stored:
    return Stored("it", benchmark, {}, {"benchmark": benchmark, "machine": {}} | dict(data))


def of_run(make_run: MakeRun, path: Path, **options: Any) -> Stored:
    make_run(**options).write(path)
    return read(path)


def test_a_slower_run_is_worse_and_its_throughput_is_not_blamed(make_run: MakeRun, tmp_path: Path) -> None:
    first = of_run(make_run, tmp_path / "a.json", count=600, seed=1)
    second = of_run(make_run, tmp_path / "b.json", count=600, seed=2, slow=1.3)
    rows = {row.name: row for row in compare(first, second).rows}
    assert rows["TPOT p50, ms"].kind == rows["ITL p50, ms"].kind == rows["TTFT p50, ms"].kind == "worse"
    assert rows["TPOT p50, ms"].ratio == pytest.approx(1.3, abs=0.05)
    assert rows["tokens / s"].kind == rows["rejected, % of offered"].kind == "same"
    assert compare(second, first).rows[0].kind == "better"


def test_runs_of_one_kind_do_not_differ(make_run: MakeRun, tmp_path: Path) -> None:
    first = of_run(make_run, tmp_path / "a.json", count=400, seed=1)
    kinds = [
        row.kind
        for seed in range(2, 6)
        for row in compare(first, of_run(make_run, tmp_path / "b.json", count=400, seed=seed)).rows
    ]
    assert kinds.count("same") > 0.9 * len(kinds)


def test_more_rejections_are_worse(make_run: MakeRun, tmp_path: Path) -> None:
    first = of_run(make_run, tmp_path / "a.json", count=600, seed=1, refused=0.02)
    second = of_run(make_run, tmp_path / "b.json", count=600, seed=2, refused=0.2)
    rows = {row.name: row for row in compare(first, second).rows}
    assert rows["rejected, % of offered"].kind == rows["answered, % of offered"].kind == "worse"


def test_the_interval_of_independent_values_covers_as_often_as_it_says() -> None:
    """Its level is 99 %; five misses in a hundred are far from it."""
    random = np.random.default_rng(0)
    found = [
        noise.bootstrap(random.exponential(size=100), random.exponential(size=100), noise.mean, seed)  # type: ignore[arg-type]
        for seed in range(100)
    ]
    assert sum(interval is None or interval.verdict != "no difference" for interval in found) <= 5


def test_values_that_hang_together_widen_the_interval() -> None:
    """Whole stretches are drawn: a run of few slow phases tells less than as many independent requests."""
    random = np.random.default_rng(1)
    alone = random.exponential(size=400)
    together = np.repeat(random.exponential(size=20), 20)
    widths = []
    for values in (alone, together):
        interval = noise.bootstrap(list(values), list(values), noise.mean)
        assert interval is not None
        widths.append(interval.high - interval.low)
    assert widths[1] > 2 * widths[0]


def test_few_values_get_no_interval() -> None:
    assert noise.bootstrap([1.0] * 7, [1.0] * 100, noise.mean) is None
    assert noise.bootstrap([0.0] * 50, [1.0] * 50, noise.mean) is None


def test_the_rank_sum_is_exact() -> None:
    """Against counting by hand, ties included."""
    first, second = [1.0, 2.0, 2.0], [2.0, 5.0, 7.0, 9.0]
    ranks = [1.0, 3.0, 3.0, 3.0, 5.0, 6.0, 7.0]
    sums = [sum(chosen) for chosen in combinations(ranks, 3)]
    expected = sum(abs(s - 12) >= abs(7 - 12) for s in sums) / len(sums)
    assert noise.rank_sum_p(first, second) == pytest.approx(expected)
    assert noise.rank_sum_p([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)


def test_many_rounds_are_drawn_and_not_counted() -> None:
    random = np.random.default_rng(2)
    alike, shifted = random.normal(size=(2, 30))
    assert noise.rank_sum_p(list(alike), list(shifted + 2)) < 0.01
    assert noise.rank_sum_p(list(alike), list(alike)) > 0.9


@pytest.mark.parametrize(
    ("name", "first", "second", "kind"),
    [
        ("tokens/s", (100, 101, 102, 103), (110, 111, 112, 113), "better"),
        ("p99 gap ms", (100, 101, 102, 103), (110, 111, 112, 113), "worse"),
        ("pages", (100, 101, 102, 103), (110, 111, 112, 113), "changed"),
        ("tokens/s", (100, 105, 102, 110), (101, 104, 103, 109), "same"),
        ("tokens/s", (100, 101, 102), (110, 111, 112), "unclear"),
        ("tokens/s", (100, 111, 102), (110, 101, 112), "same"),
        ("tokens/s", (100,), (200,), "unclear"),
    ],
)
def test_rounds_are_judged_by_ranks(name: str, first: tuple[float, ...], second: tuple[float, ...], kind: str) -> None:
    assert row_of_figures(Figure((name,), first), Figure((name,), second)).kind == kind


def test_figures_are_found_wherever_they_lie() -> None:
    data = {
        "shape": "tiny",
        "results": [{"rows": 4, "base: ms a step": 2.5}, {"rows": 16, "base: ms a step": 3.5}],
        "ratios": {"ours / theirs": 2},
        "rounds": {"deep": {"tokens/s": [1, 2, 3]}},
    }
    found = {figure.name: figure.values for figure in figures(stored("step", data))}
    assert found == {
        "rows 4: base: ms a step": (2.5,),
        "rows 16: base: ms a step": (3.5,),
        "ratios: ours / theirs": (2.0,),
        "rounds: deep: tokens/s": (1.0, 2.0, 3.0),
    }


def test_files_of_different_benchmarks_are_refused() -> None:
    with pytest.raises(NotStored, match="only results of one benchmark"):
        compare(stored("step", {}), stored("mixed", {}))
    with pytest.raises(NotStored, match="no figure in common"):
        compare(stored("step", {"a": 1}), stored("step", {"b": 1}))


def test_what_was_not_the_same_is_said() -> None:
    first, second = (stored("step", {"plan": {"rank": rank, "rounds": 3}, "ms": 1}) for rank in (8, 16))
    assert "Not the same plan: rank (8 and 16)." in compare(first, second).notes


def test_parts_are_compared_one_by_one(make_run: MakeRun, tmp_path: Path) -> None:
    for name, slow in (("a", 1.0), ("b", 2.0)):
        make_run(count=300, slow=slow).write(tmp_path / "load.json")
        whole = {
            "benchmark": "smoke",
            "machine": {},
            "parts": {
                "load": json.loads((tmp_path / "load.json").read_text()),
                "step": {"benchmark": "step", "base: ms": [1.0, 1.0, 1.0, 1.0]},
            },
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(whole))
    out = tmp_path / "both.html"
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = {row.name: row.kind for row in compare(read(tmp_path / "a.json"), read(tmp_path / "b.json")).rows}
    assert rows["load: TTFT p50, ms"] == "worse"
    assert rows["step: base: ms"] == "same"
    assert "worse (higher)" in out.read_text()
    assert "load: TTFT p50, ms" in out.with_suffix(".md").read_text()
