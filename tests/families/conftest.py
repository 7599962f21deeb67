"""The adapters that PEFT made, shared by the test processes of one run."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def families_cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    root = tmp_path_factory.getbasetemp()
    return (root if worker_id == "master" else root.parent) / "families"
