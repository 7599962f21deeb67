"""The benchmarks of scheduling, end to end on a tiny shape: figures are there and add up, whatever they are."""

from __future__ import annotations

import json
from pathlib import Path

from onebase.bench import fair, long_prompt, shared_prefix


def test_fair(tmp_path: Path) -> None:
    plan = fair.Plan(
        "tiny", others=2, times=5, rate=4.0, seconds=1.0, tokens_in=(4, 9), tokens_out=(2, 5), seats=4, rounds=1
    )
    jobs = plan.jobs(1, flood=True)
    assert sum(job.tenant == fair.FLOOD for job in jobs) == 20
    pairs = list(zip([job for job in jobs if job.watched], plan.jobs(1, flood=False), strict=True))
    assert all((one.at, len(one.prompt)) == (other.at, len(other.prompt)) for one, other in pairs)
    assert all(one.prompt != other.prompt for one, other in pairs)
    fair.run(plan, "cpu", tmp_path / "fair.json")
    result = json.loads((tmp_path / "fair.json").read_text())
    assert result["ratio"] > 0
    assert len(result["ttft_p90_ms"]["beside"]) == 1


def test_long_prompt(tmp_path: Path) -> None:
    long_prompt.run(
        long_prompt.Plan("tiny", streams=3, tokens_out=12, prompt=200, rounds=1), "cpu", tmp_path / "long.json"
    )
    sides = json.loads((tmp_path / "long.json").read_text())["sides"]
    assert set(sides) == {"stretch 2.2", "no bound"}
    assert all(side["p99_over_median"][0] >= 1 for side in sides.values())


def test_shared_prefix(tmp_path: Path) -> None:
    plan = shared_prefix.Plan("tiny", requests=6, shared=64, own=3, rank=2, rounds=1)
    shared_prefix.run(plan, "cpu", tmp_path / "prefix.json")
    result = json.loads((tmp_path / "prefix.json").read_text())
    assert result["across"] == 0
    assert result["ratio"] > 0
