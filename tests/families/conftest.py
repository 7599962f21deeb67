"""The adapters that PEFT made, shared by the test processes of one run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def families_cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    root = tmp_path_factory.getbasetemp()
    return (root if worker_id == "master" else root.parent) / "families"


@pytest.fixture(scope="module")
def driver_of(make_driver: Callable[..., Any]) -> Callable[[str], Any]:
    """One engine for each architecture."""
    return functools.cache(lambda architecture: make_driver(architecture, kv_memory=0.02))
