"""The wheel: built from a copy of the sources, installed elsewhere, and every module of it imported from there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("adapters", "bench", "kernels", "serve")
PROJECT = ("pyproject.toml", "README.md", "LICENSE")
# -S: no .pth file is read, so the editable install of this checkout cannot stand in for what the wheel lacks.
IMPORT_ALL = """
import importlib, json, pathlib, sys
target, libraries, modules = json.loads(sys.stdin.read())
sys.path[:0] = [target, *libraries]
for name in modules:
    origin = pathlib.Path(importlib.import_module(name).__file__)
    assert origin.is_relative_to(target), f"{name} came from {origin}"
"""


def source_packages() -> Iterator[str]:
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("__init__.py"):
            yield ".".join(("onebase", *file.parent.relative_to(ROOT).parts))


def source_files() -> set[str]:
    """Every module, demo asset and table of configurations, as the wheel names it."""
    modules = {file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    folders = ("serve/demo/assets", "kernels/tuned", "kernels/native")
    assets = {
        file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file() and file.suffix != ".pyc"
    }
    return {f"onebase/{file.relative_to(ROOT).as_posix()}" for file in modules | assets}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: the checkout's build folder may hold modules that are gone from the sources."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in PROJECT:
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-P", "-m", "pip", "install", *options, "--target", str(target), str(wheel)]
    subprocess.run(command, check=True)
    return target


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert listed == sorted(source_packages())


def test_wheel_holds_all_modules_and_assets_and_nothing_else(members: set[str]) -> None:
    assert any(name.startswith("onebase/serve/demo/assets/base/") for name in members)
    assert {name for name in members if ".dist-info/" not in name} == source_files()


def test_nothing_is_importable_under_a_bare_name(members: set[str]) -> None:
    top = {name.partition("/")[0] for name in members}
    assert {name for name in top if not name.endswith(".dist-info")} == {"onebase"}


def test_every_module_imports_from_the_wheel(installed: Path, members: set[str]) -> None:
    files = sorted(name for name in members if name.endswith(".py"))
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files]
    libraries = sorted({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})
    told = json.dumps([str(installed), libraries, modules])
    command = [sys.executable, "-P", "-S", "-c", IMPORT_ALL]
    done = subprocess.run(command, check=False, input=told, capture_output=True, text=True, cwd=installed)
    assert done.returncode == 0, done.stderr


def test_console_script_and_licence(installed: Path) -> None:
    (info,) = installed.glob("onebase-*.dist-info")
    points = ConfigParser()
    points.read(info / "entry_points.txt")
    assert dict(points["console_scripts"]) == {"onebase": "onebase.serve.cli:app"}
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (installed / "bin" / "onebase").is_file()


def test_client_environments_hold_what_the_extras_pin() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {name: packages for name, packages in extras.items() if name.startswith("clients-")}
    for name, packages in pinned.items():
        file = ROOT / "tests/clients" / f"{name.removeprefix('clients-').replace('-', '_')}.txt"
        assert {package.replace("[api]", "") for package in packages} <= set(
            file.read_text().replace("_", "-").splitlines()
        )
    assert {file.stem for file in (ROOT / "tests/clients").glob("*.txt")} == {
        name.removeprefix("clients-").replace("-", "_") for name in pinned
    }
