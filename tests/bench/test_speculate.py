"""The three texts of the benchmark are what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

from onebase.bench.speculate import run


def test_drafts_are_right_wrong_or_not_found(tmp_path: Path) -> None:
    run("tiny", "cpu", 2, 12, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    right, drafts = (
        {case: float(result[name]) for case, result in found.items()}
        for name in ("drafts that were right", "drafts a token")
    )
    assert right["every draft right"] > 0.9
    assert right["drafts wrong"] < 0.5
    assert drafts["every draft right"] > drafts["no draft found"]
