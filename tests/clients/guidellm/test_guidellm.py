"""guidellm, as its command line is used: short benchmarks of the base and an adapter, without a failed request."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REQUESTS = 6


@pytest.mark.parametrize(
    ("model", "route"),
    [("valley", "/v1/completions"), ("shout", "/v1/completions"), ("pirate", "/v1/chat/completions")],
)
def test_a_benchmark_has_no_failures(served: Any, tmp_path: Path, model: str, route: str) -> None:
    backend = {"kind": "openai_http", "target": served.url, "model": model, "request_format": route}
    data = {"kind": "synthetic_text", "prompt_tokens": 24, "output_tokens": 6}
    report = tmp_path / "report.json"
    config = {
        "--backend": {**backend, "api_key": served.key, "http2": False},
        "--profile": {"kind": "concurrent", "streams": [3]},
        "--constraint": {"kind": "max_requests", "count": REQUESTS},
        "--data": data,
        "--tokenizer": {"kind": "huggingface_auto", "model": str(served.base)},
        "--output": {"kind": "json", "path": str(report)},
    }
    options = [part for name, value in config.items() for part in (name, json.dumps(value))]
    command = [sys.executable, "-P", "-m", "guidellm", "run", "--disable-console", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (REQUESTS, 0)
    assert benchmark["metrics"]["output_token_count"]["successful"]["mean"] > 0
