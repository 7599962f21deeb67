"""Pages: one file that needs nothing else, for any number of adapters, whatever they are called."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onebase.bench.cli import app
from onebase.bench.load.result import LoadResult
from onebase.bench.reports.gauges import _rate, _share
from onebase.bench.reports.heat import ROWS, groups
from onebase.bench.reports.load_page import load_page
from onebase.bench.reports.stored import read
from onebase.bench.reports.write import document, write_report

from .conftest import MakeRun

RESULTS = sorted((Path(__file__).parents[3] / "bench/results").glob("*.json"))
VOID = {"meta", "br"}


class Checked(HTMLParser):
    """Every element is closed, and numbers of SVG are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        for name, value in attrs:
            assert not name.startswith("on")
            assert "nan" not in (value or "").lower().split()
            assert not re.search(r"(?:^|[ MLHVh])(?:nan|inf|-inf)\b", value or "") or name == "aria-label"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def checked(html: str) -> str:
    """Its text."""
    parser = Checked()
    parser.feed(html)
    assert not parser.open
    assert not re.search(r"(?:src|href|@import|url\()\s*=?\s*[\"'(]?https?:", html)
    return " ".join(parser.texts)


@pytest.mark.parametrize("adapters", [1, 30, 2000])
def test_a_load_runs_page_holds_its_figures_and_plots(make_run: MakeRun, adapters: int) -> None:
    run = make_run(adapters=adapters, count=400)
    text = checked(load_page("a run", run))
    for expected in (
        "TTFT, ms (log scale)",
        "share of all, %",
        "tokens / s",
        "Running and waiting",
        "Cache tiers: events",
    ):
        assert expected in text
    assert f"{run.summary.attainment:.1%}" in text
    assert "SLO" in text


def test_a_run_in_which_nothing_was_answered_has_a_page(make_run: MakeRun) -> None:
    run = make_run(count=10, refused=1.0)
    text = checked(load_page("refused", replace(run, timeline=())))
    assert "Nothing was measured." in text
    empty = replace(run, requests=(), timeline=())
    checked(load_page("empty", empty))


def test_a_run_of_one_request_has_a_page(make_run: MakeRun) -> None:
    checked(load_page("one", make_run(adapters=1, count=1, refused=0.0)))


def test_names_are_shown_and_never_run(make_run: MakeRun) -> None:
    run = make_run(adapters=1, count=20)
    hostile = "<script>alert(1)</script>&\"'"
    requests = tuple(replace(request, adapter=hostile) for request in run.requests)
    summary = replace(run.summary, per_adapter={hostile: next(iter(run.summary.per_adapter.values()))})
    assert hostile in checked(load_page(hostile, replace(run, requests=requests, summary=summary)))


def test_counters_are_drawn_as_rates(make_run: MakeRun) -> None:
    """Also across a restart of the server, which counts from zero again."""
    run = make_run()
    assert {rate for _, rate in _rate(run, "adapter_loads")} == {3.0}
    assert {share for _, share in _share(run, "prefix_cache_hits", "prefix_cache_queries")} == {25.0}
    restarted = replace(run, timeline=({"t": 0.0, "adapter_loads": 9.0}, {"t": 1.0, "adapter_loads": 2.0}))
    assert _rate(restarted, "adapter_loads") == [(1.0, 0.0)]


def test_heat_has_a_row_for_each_adapter_while_they_fit() -> None:
    assert groups(0) == []
    assert [len(places) for places in groups(ROWS)] == [1] * ROWS
    for count in (41, 79, 1544, 2000):
        found = groups(count)
        assert len(found) <= ROWS
        assert [place for places in found for place in places] == list(range(count))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_stored_result_has_a_page(path: Path) -> None:
    stored = read(path)
    assert stored.benchmark in checked(document(stored))


def test_a_file_of_several_results_has_one_page(make_run: MakeRun, tmp_path: Path) -> None:
    path = store(make_run(), tmp_path / "load.json")
    whole = {"benchmark": "smoke", "machine": {}, "parts": {"load": json.loads(path.read_text())}}
    (tmp_path / "smoke.json").write_text(json.dumps(whole))
    html, text = write_report(tmp_path / "smoke.json")
    assert "Running and waiting" in checked(html.read_text())
    assert "attainment" in text.read_text()


def store(run: LoadResult, path: Path) -> Path:
    run.write(path)
    return path


def test_the_command_writes_both_files_beside_the_result(make_run: MakeRun, tmp_path: Path) -> None:
    path = store(make_run(), tmp_path / "run.json")
    done = CliRunner().invoke(app, ["report", str(path)])
    assert done.exit_code == 0
    assert checked((tmp_path / "run.html").read_text())
    assert "| attainment |" in (tmp_path / "run.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a result is a JSON object"),
        ("{", "not JSON"),
        ('{"machine": {}}', "`benchmark` must name"),
        ('{"benchmark": "step"}', "`machine` must be"),
        ('{"benchmark": "load", "machine": {}}', "missing required field"),
        ('{"benchmark": "smoke", "machine": {}, "parts": [1]}', "`parts` must be"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_result_is_refused_with_the_reason(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    done = CliRunner().invoke(app, ["report", str(path)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
