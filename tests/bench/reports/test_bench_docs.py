"""docs/benchmarks.md is what the stored results say, and says where we are behind."""

from __future__ import annotations

import json
from pathlib import Path

from onebase.bench.cli import app as bench
from onebase.bench.reports.claims import CLAIMS, check
from onebase.bench.reports.docs import _AGAIN, document
from onebase.bench.reports.stored import Stored, read

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "bench/results"


def test_the_document_is_up_to_date() -> None:
    """Else: onebase bench docs."""
    assert (ROOT / "docs/benchmarks.md").read_text() == document(RESULTS)


def test_every_stored_result_is_held_against_something_or_shown() -> None:
    text = document(RESULTS)
    for path in RESULTS.glob("*.json"):
        assert f"(../bench/results/{path.name})" in text


def test_claims_name_figures_that_results_have() -> None:
    """Of the benchmarks that have a stored result."""
    results = [read(path) for path in RESULTS.glob("*.json")]
    stored = {one.benchmark for one in results}
    found = {(one.claim.benchmark, one.claim.figure) for one in check(results)}
    assert {(one.benchmark, one.figure) for one in CLAIMS if one.benchmark in stored} <= found


def test_what_misses_its_target_is_told(tmp_path: Path) -> None:
    for name, ratio in (("good", 1.2), ("bad", 1.9)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"benchmark": "fair", "machine": {}, "ratio": ratio}))
    text = document(tmp_path)
    behind, ahead = text.partition("## Where we are behind")[2].split("## Where we are not")
    assert "bad.json" in behind
    assert "good.json" not in behind
    assert "good.json" in ahead.partition("## fair")[0]


def test_each_peer_is_compared_in_the_sense_of_its_metric() -> None:
    figures = {"adapters": {"tokens/s": {"ours": [200], "peft": [50]}, "TTFT p50, ms": {"ours": [90], "peft": [30]}}}
    stored = Stored("it", "peers", {}, {"benchmark": "peers", "machine": {}, "figures": figures})
    found = {row.claim.what: (row.value, row.holds) for row in check([stored])}
    assert found == {
        "adapters: tokens/s: ours / peft": (4.0, True),
        "adapters: TTFT p50, ms: ours / peft": (3.0, False),
    }


def test_commands_of_the_document_exist() -> None:
    names = {command.name or (command.callback and command.callback.__name__) for command in bench.registered_commands}
    for again in _AGAIN.values():
        if again.startswith("onebase bench "):
            assert again.split()[2].replace("-", "_") in names
