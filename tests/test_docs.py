"""The documents say what is there: targets, routes, metrics, options, files, links. And the README's lines work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from fastapi import FastAPI

from onebase.serve.api.app import create_app
from onebase.serve.cli import app as command_line
from onebase.serve.config import Settings
from onebase.serve.engine.messages import EngineInfo, EngineStats

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
HTTP = (ROOT / "docs/http.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/decisions.md",
    "docs/http.md",
)
OF_FASTAPI = {"GET /openapi.json", "GET /docs"}
DEMO = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """The application over an engine that only knows its gauges."""
    info = EngineInfo("llama", "f", "cpu", "float32", 10, 10, 16, 10, 10, ())
    engine: Any = SimpleNamespace(stats=EngineStats(), info=info, ready=True, restarts=0)
    return create_app(Settings(model="base"), engine)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    lines = re.findall(r"(?:^ {4}|`)make ([a-z -]+)", (ROOT / document).read_text(), re.MULTILINE)
    named = {target for line in lines for target in line.split()}
    assert named <= make_targets()
    assert document != "README.md" or {"serve", "test"} <= named


def test_documented_routes_are_the_servers_routes(app: FastAPI) -> None:
    documented = set(re.findall(r"^\| `((?:GET|POST|PUT|PATCH|DELETE) /[^`]*)`", HTTP, re.MULTILINE))
    paths = app.openapi()["paths"]
    assert documented == {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    mentioned = set(re.findall(r"`((?:GET|POST|PUT|PATCH|DELETE) /[^`]*)`", HTTP))
    assert mentioned - documented == OF_FASTAPI


def test_documented_metrics_are_the_servers_metrics(app: FastAPI) -> None:
    documented = set(re.findall(r"`((?:vllm:|onebase_)\w+)", HTTP))
    families = app.state.server.metrics.families()
    served = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert documented == served


def test_options_named_in_documents_exist() -> None:
    commands = [typer.main.get_command(command_line)]
    options = {"--gpus", "--help"}
    while commands:
        command: Any = commands.pop()
        options |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        commands += getattr(command, "commands", {}).values()
    for document in ("README.md", "docs/http.md", "docs/decisions.md", "docs/architecture.md"):
        text = (ROOT / document).read_text()
        named = set(re.findall(r"`(--[a-z][a-z-]+)", text)) | set(
            re.findall(r"^ {4}.*onebase .*?(--[a-z-]+)", text, re.M)
        )
        assert named <= options, document


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_point_to_files(document: str) -> None:
    file = ROOT / document
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", file.read_text()):
        path, _, anchor = target.partition("#")
        linked = file.parent / path if path else file
        assert linked.is_file(), target
        titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {title.lower().replace(" ", "-") for title in titles}, target


def test_architecture_maps_every_file() -> None:
    mapped, folder = set(), ""
    for line in ARCHITECTURE.partition("\n## Map\n")[2].splitlines():
        if heading := re.match(r"([a-z/]+)/ - ", line):
            folder = heading[1]
        elif entry := re.match(r" {4}(\S+\.py) +\S", line):
            mapped.add(f"{folder}/{entry[1]}")
    files = {
        file.relative_to(ROOT).as_posix()
        for name in ("adapters", "bench", "kernels", "serve")
        for file in (ROOT / name).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert mapped == files


def pasted() -> list[str]:
    """The README's lines for the demo: each block as a user pastes it."""
    return re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """The address of `onebase demo`, once it says that it is ready."""
    command = [sys.executable, "-P", "-c", "from onebase.serve.cli import app; app()", "demo", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        try:
            assert "OneBase serves" in first
            yield first.split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def test_the_readmes_lines_work_as_they_stand(demo: str) -> None:
    blocks = pasted()
    assert len(blocks) > 5
    for block in blocks:
        script = block.replace(DEMO, demo).replace(".venv/bin/python", sys.executable)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            check=False,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "ONEBASE_URL": demo},
        )
        assert done.returncode == 0, block + done.stderr
        assert done.stdout.strip(), block
        assert '"error"' not in done.stdout, block + done.stdout
