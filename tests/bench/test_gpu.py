"""The stages for a GPU run where torch and transformers are and little else; the script names all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from onebase.bench.gpu import STAGES

ROOT = Path(__file__).parents[2]
ABSENT = (
    *("fastapi", "httpx", "msgspec", "obstore", "openai", "prometheus_client", "pydantic", "pydantic_settings", "rich"),
    *("starlette", "structlog", "typer", "uvicorn", "uvloop", "zmq", "llguidance", "peft", "matplotlib"),
)


def test_a_stage_runs_without_the_http_stack(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        "from onebase.bench import gpu\n"
        "gpu._PROMPTS, gpu._PROMPT, gpu._GEMM = 2, 24, 256\n"
        f"gpu.main(['prefill', '--device', 'cpu', '--shape', 'tiny', '--out', {str(tmp_path)!r}])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "prefill.json").read_text())
    assert stored["share of the GEMM rate"] > 0
    assert stored["tokens/s"] > 0


def test_the_correctness_stage_finds_its_tests_without_the_http_stack() -> None:
    """A test file that cannot be imported there would end the stage before its first test."""
    options = ["-o", "addopts=", "-o", "filterwarnings=default", "--import-mode=importlib", "-q", "--collect-only"]
    where = [
        str(ROOT / "tests" / name) for name in ("kernels", "serve/model/test_fused.py", "serve/engine/test_graphs.py")
    ]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        f"import pytest; sys.exit(pytest.main({[*options, '-m', 'gpu', *where]!r}))"
    )
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "test_cuda_graphs_say_what_eager_steps_say" in done.stdout


def test_the_script_runs_every_stage() -> None:
    script = (ROOT / "bench/gpu.sh").read_text()
    (line,) = [line for line in script.splitlines() if line.startswith("for name in")]
    assert set(STAGES) | {"correctness"} == set(line.split(":-")[1].split("}")[0].split())
    assert subprocess.run(["sh", "-n", ROOT / "bench/gpu.sh"], check=False).returncode == 0
