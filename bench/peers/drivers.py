"""How each server is started over the same model, and how adapters get into it. Nothing here is installed with us.

A driver starts its server on a free port of this machine and ends it in any case. Adapters come in through vLLM's
route, which ours and the PEFT server have too. What a server refuses there, or does not answer for, is its refusal.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from onebase.bench.http_server import BASE

START_SECONDS = 600.0  # some compile for minutes


@dataclass(frozen=True, slots=True)
class Stage:
    """What is the same for all. adapters: name -> folder. rows: sequences at once. logs: a folder for them."""

    model: Path
    adapters: Mapping[str, Path]
    max_rank: int
    rows: int
    dtype: str
    logs: Path


class NotStarted(RuntimeError):
    """A server is not there, or did not become ready. The message has the end of its log."""


class Driver(Protocol):
    """name: how results call it."""

    @property
    def name(self) -> str: ...

    def serving(self, stage: Stage) -> AbstractContextManager[str]:
        """The server's address while the body runs. Raises NotStarted."""

    def load(self, client: httpx.Client, name: str, folder: Path) -> str | None:
        """Bring an adapter in; the reason where it is refused."""


def load_as_vllm(client: httpx.Client, name: str, folder: Path) -> str | None:
    answer = client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
    return None if answer.status_code == 200 else f"{answer.status_code}: {answer.text[:500]}"


@dataclass(frozen=True, slots=True)
class Process:
    """A server that is a command. ready: the path that answers 200 once it serves. environment: beside ours.

    ``{port}`` and the stage's ``{model}``, ``{rows}``, ``{dtype}``, ``{max_rank}``, ``{adapters}`` (how many) and
    ``{data}`` (a folder of its own) are filled in.
    """

    name: str
    command: Sequence[str]
    ready: str = "/health"
    environment: Mapping[str, str] | None = None
    refuses: str | None = None  # why it takes none of these adapters

    @contextmanager
    def serving(self, stage: Stage) -> Iterator[str]:
        port = _free_port()
        command = self._filled(stage, port)
        if shutil.which(command[0]) is None:
            raise NotStarted(f"{self.name}: {command[0]} is not installed")
        log = stage.logs / f"{self.name}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(self.environment or {})}
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(self.name, process, url + self.ready, log)
            yield url
        finally:
            process.terminate()
            _end(process)

    def load(self, client: httpx.Client, name: str, folder: Path) -> str | None:
        return self.refuses or load_as_vllm(client, name, folder)

    def _filled(self, stage: Stage, port: int) -> list[str]:
        data = stage.logs / f"{self.name}-data"
        values = {
            "port": port,
            "model": stage.model,
            "rows": stage.rows,
            "dtype": stage.dtype,
            "max_rank": stage.max_rank,
            "adapters": max(1, len(stage.adapters)),
            "folder": Path(os.path.commonpath([stage.model, *stage.adapters.values()])),
            "data": data,
        }
        return [part.format(**values) for part in self.command]


@dataclass(frozen=True, slots=True)
class Running:
    """A server that somebody else started, and that knows the adapters by these names already."""

    name: str
    url: str

    @contextmanager
    def serving(self, stage: Stage) -> Iterator[str]:
        yield self.url

    def load(self, client: httpx.Client, name: str, folder: Path) -> str | None:
        """Whether it does, the probe tells."""
        return None


_PYTHON = (sys.executable, "-P")
_ONEBASE = (*_PYTHON, "-c", "from onebase.serve.cli import app; app()", "serve")
_VLLM = ("--served-model-name", BASE, "--dtype", "{dtype}", "--max-num-seqs", "{rows}", "--port", "{port}")
_VLLM_LORA = ("--enable-lora", "--max-lora-rank", "{max_rank}", "--max-loras", "8", "--max-cpu-loras", "{adapters}")
_PEFT = ("--rows", "{rows}", "--dtype", "{dtype}", "--port", "{port}")
DRIVERS: Mapping[str, Driver] = {
    driver.name: driver
    for driver in (
        Process(
            "ours",
            (*_ONEBASE, "{model}", *_VLLM, "--allow-path", "{folder}", "--data-dir", "{data}", "--kv-memory", "1"),
            ready="/ready",
        ),
        Process(
            "peft",
            (*_PYTHON, "-m", "onebase.bench.peers.peft_server", "{model}", *_PEFT),
        ),
        Process(
            "vllm",
            ("vllm", "serve", "{model}", *_VLLM, *_VLLM_LORA),
            environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
        ),
        Process(
            "llama.cpp",
            ("llama-server", "-m", "{model}/model.gguf", "--alias", BASE, "-np", "{rows}", "--port", "{port}"),
            refuses="wants adapters as GGUF files at the start, and picks them by a field `lora`, not by `model`",
        ),
    )
}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_ready(name: str, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise NotStarted(f"{name}: ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise NotStarted(f"{name}: not ready after {START_SECONDS:g} s:\n{log.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
