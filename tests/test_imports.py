"""Imports run one way: serve -> adapters -> kernels. And the engine imports without the HTTP stack."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("adapters", "bench", "kernels", "serve")
# bench may import everything; serve reaches it in one place, for the `onebase bench` command.
ALLOWED = {
    "kernels": {"kernels"},
    "adapters": {"adapters", "kernels"},
    "serve": {"adapters", "kernels", "serve"},
    "bench": {"adapters", "bench", "kernels", "serve"},
}
COMMAND_LINE = ("serve/cli.py", "onebase.bench.cli")
HTTP_STACK = ("fastapi", "msgspec", "prometheus_client", "pydantic", "starlette", "structlog", "uvicorn", "zmq")
ENGINE_CORE = ("serve/model", "kernels", "adapters")
ENGINE_ENTRIES = ("onebase.serve.engine.engine", "onebase.serve.engine.inprocess", "onebase.bench.step")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(level, module) of every import statement, wherever it stands: one entry per name that may be a module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, f"{node.module or ''}.{alias.name}") for alias in node.names)


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("onebase", *parts)).removesuffix(".__init__")


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    wrong = []
    for file in sources(package):
        where = file.relative_to(ROOT).as_posix()
        for _, module in imports(file):
            top, _, rest = module.partition(".")
            other = rest.partition(".")[0]
            excepted = where == COMMAND_LINE[0] and module.startswith(COMMAND_LINE[1])
            if top == "onebase" and other not in ALLOWED[package] and not excepted:
                wrong.append(f"{where} imports {module}")
    assert not wrong


@pytest.mark.parametrize("folder", [*PACKAGES, "tests"])
def test_imports_are_absolute_and_under_the_namespace(folder: str) -> None:
    """Tests may name a conftest beside them; nothing may import the folders bare."""
    wrong = [
        f"{file.relative_to(ROOT)} imports {'.' * level}{module}"
        for file in sources(folder)
        for level, module in imports(file)
        if (level and folder != "tests") or (not level and module.partition(".")[0] in PACKAGES)
    ]
    assert not wrong


def test_engine_imports_without_the_http_stack() -> None:
    modules = [*ENGINE_ENTRIES, *(name_of(file) for folder in ENGINE_CORE for file in sources(folder))]
    lines = [
        "import importlib, sys",
        f"sys.modules.update(dict.fromkeys({HTTP_STACK!r}))",
        f"for name in {modules!r}: importlib.import_module(name)",
    ]
    command = [sys.executable, "-P", "-c", "\n".join(lines)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
