"""The stages for a GPU run where torch and transformers are and little else; the script names all of them."""

from __future__ import annotations

import json
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


def test_the_script_runs_every_stage() -> None:
    script = (ROOT / "bench/gpu.sh").read_text()
    (line,) = [line for line in script.splitlines() if line.startswith("for name in")]
    assert set(STAGES) | {"correctness"} == set(line.split(":-")[1].split("}")[0].split())
    assert subprocess.run(["sh", "-n", ROOT / "bench/gpu.sh"], check=False).returncode == 0
