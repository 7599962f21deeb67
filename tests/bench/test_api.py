"""`onebase bench api`: every token of every stream arrives, over HTTP, and has its price."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onebase.bench.api import Case, run
from onebase.bench.api_clients import BODIES


@pytest.mark.parametrize("route", BODIES)
def test_streams_are_counted_and_stored(route: str, tmp_path: Path) -> None:
    out = tmp_path / "api.json"
    run(Case(route, streams=3, tokens=5, pause=0.001), 1, out)
    stored = json.loads(out.read_text())
    assert stored["case"] == {"route": route, "streams": 3}
    (value,) = stored["us_per_token"]
    assert value > 0
