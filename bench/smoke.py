"""Load, step and lifecycle in small, in minutes on two cores: one file that two commits can be compared by.

The load goes to the real server over HTTP, a model of the tiny shape with LoRA adapters, S-LoRA's popularity.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from onebase.bench import lifecycle, step
from onebase.bench.bed import Plan
from onebase.bench.http_server import save_model, serving
from onebase.bench.load.options import Options
from onebase.bench.load.run import run as run_load
from onebase.bench.load.slo import Slo
from onebase.bench.load.workload import Workload
from onebase.bench.quiet import Quiet
from onebase.bench.report import machine, store
from onebase.bench.workload import mixed_ranks, random_model, save_adapters

_ADAPTERS = 16


def run(out: Path, seconds: float = 45.0, repeats: int = 5) -> None:
    """seconds: of the load; repeats: of step, so that ranks can tell two commits apart."""
    with tempfile.TemporaryDirectory(prefix="onebase-smoke-") as name:
        place = Path(name)
        parts: dict[str, Any] = {"load": _load(place, seconds)}
        parts["step"] = _merged(
            [_stored(place, lambda path: step.run("tiny", "cpu", [1, 16], 16, 0, 64, path)) for _ in range(repeats)]
        )
        parts["lifecycle"] = _stored(place, lambda path: lifecycle.run(_lifecycle(), ("overcommit", "cold"), path))
    store(out, "smoke", {"parts": parts})


def _lifecycle() -> Plan:
    return Plan("tiny", "cpu", registered=64, room=16, fit=8, rank=8, requests=64, clients=8, rounds=4)


def _load(place: Path, seconds: float) -> dict[str, Any]:
    model = random_model("tiny", torch.float32, "cpu")
    folders = save_adapters(model, place, mixed_ranks(_ADAPTERS))
    saved = save_model(random_model("tiny", torch.float32, "cpu"), place / "model")
    options = ["--device", "cpu", "--kv-memory", "0.5", "--adapter-memory", "0.25"]
    workload = Workload(rate=8.0, seconds=seconds, popularity="power:0.3", tokens_in="32:97", tokens_out="16:33")
    with serving(saved, {folder.name: folder for folder in folders}, options, place / "data") as server:
        told = Options(
            f"http://{server.host}:{server.port}", workload, slo=Slo(ttft=1.0, tpot=0.1), warm_up=min(5.0, seconds / 4)
        )
        result = asyncio.run(run_load(told, Quiet(), machine()))
    return _stored(place, result.write)


def _stored(place: Path, measure: Callable[[Path], object]) -> dict[str, Any]:
    """What a benchmark writes."""
    path = place / "part.json"
    measure(path)
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def _merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Repeats of a benchmark as one: its numbers become series of rounds."""
    return {key: _series([run[key] for run in runs]) for key in runs[0]}


def _series(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _series([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_series([value[place] for value in values]) for place in range(len(first))]
    return list(values) if isinstance(first, float) else first
