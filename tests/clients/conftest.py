"""A server with the demo's base and two adapters, for the packages that real clients use.

The packages do not go together, so each set has an environment of its own below build/clients (`make clients-test`), on
top of .venv; what the present one lacks is not collected. Servers run on .venv alone. Nothing leaves this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    DO_NOT_TRACK="1",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    LITELLM_TELEMETRY="False",
    LANGCHAIN_TRACING_V2="false",
    LANGSMITH_TRACING="false",
    TOKENIZERS_PARALLELISM="false",
)
for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
    os.environ.pop(variable, None)

ROOT = Path(__file__).parents[2]
BASE = ROOT / "serve/demo/assets/base"
ADAPTERS = {name: ROOT / "serve/demo/assets/adapters" / name for name in ("shout", "pirate")}
KEY, ADMIN_KEY = "a-client's-key", "an-operator's-key"
NEEDS = {
    "openai": ("openai",),
    "frameworks": ("langchain_openai", "litellm", "llama_index.llms.openai_like"),
    "lm_eval": ("lm_eval",),
    "guidellm": ("guidellm",),
}


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


collect_ignore = [folder for folder, modules in NEEDS.items() if not all(map(_is_there, modules))]


@dataclass(frozen=True)
class Served:
    """url: without /v1. model: the base's name; folders: what it and its adapters were loaded from."""

    url: str
    model: str
    base: Path
    adapters: dict[str, Path]
    key: str = KEY

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


def _python() -> str:
    """Of .venv, which has what the server needs and nothing else; CI may have made it elsewhere."""
    ours = ROOT / ".venv/bin/python"
    return str(ours) if ours.exists() else sys.executable


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for each environment, with float32 weights."""
    log = tmp_path_factory.mktemp("served") / "log"
    options = ["--served-model-name", "valley", "--port", "0", "--dtype", "float32", "--device", "cpu"]
    options += ["--kv-memory", "0.1", "--adapter-memory", "0.1", "--max-inflight-seqs", "96"]
    options += [part for name, folder in ADAPTERS.items() for part in ("--adapter", f"{name}={folder}")]
    options += ["--api-key", KEY, "--admin-key", ADMIN_KEY, "--data-dir", str(log.parent / "data")]
    command = [_python(), "-P", "-c", "from onebase.serve.cli import app; app()", "serve", str(BASE), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        first = process.stdout.readline()
        try:
            assert "OneBase serves" in first, log.read_text()
            yield Served(first.split()[-1], "valley", BASE, ADAPTERS)
        finally:
            process.terminate()
            process.wait(60)
