"""Decode steps by themselves: base rows without and with adapters on the device, and rows of distinct adapters.

The adapters are made in memory, so that this runs where PEFT is not installed.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from onebase.adapters.base import BaseModel, SiteKind
from onebase.bench import overhead
from onebase.bench.ours import adapter_use, make_resident
from onebase.bench.report import ratio, show, store
from onebase.bench.workload import LINEARS, mixed_ranks, random_model
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.engine import Engine
from onebase.serve.engine.messages import Request, SamplingParams
from onebase.serve.model.loader import prepare

_ROUNDS = 5
_PROMPT = 128


def run(
    shape: str, device: str, batches: Sequence[int], num_adapters: int, rank: int, steps: int, out: Path | None
) -> None:
    """Print seconds a step and tokens per second for each number of rows."""
    ranks = [rank] * num_adapters if rank else mixed_ranks(num_adapters)
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as name:
        engine, folders = make_engine(shape, device, max(batches), ranks, Path(name))
        results = [measure(engine, rows, folders, steps) for rows in batches]
        parts = [{"rows": rows, **_overhead(engine, rows, folders, steps)} for rows in batches]
    for result, beside in zip(results, parts, strict=True):
        show(f"{shape} on {device}, {result['rows']} rows", {k: f"{v:.3f}" for k, v in result.items() if k != "rows"})
        title = f"{result['rows']} rows of adapters: ms of the loop's CPU time a step"
        show(title, {part: f"{value:.3f}" for part, value in beside.items() if part != "rows"})
    store(out, "step", {"shape": shape, "ranks": ranks, "results": results, "overhead": parts})


def make_engine(shape: str, device: str, rows: int, ranks: Sequence[int], folder: Path) -> tuple[Engine, list[Path]]:
    """An engine for as many rows, and folders of adapters of these ranks."""
    config = EngineConfig(
        model=shape,
        device=device,
        max_num_seqs=rows,
        max_model_len=2048,
        kv_memory=4.0 if device == "cpu" else 16.0,
        prefix_caching=False,  # every row has the same prompt
        max_step_stretch=0.0,  # prompts first
    )
    base = prepare(random_model(shape, torch.bfloat16, device), config)
    folders = [save_adapter(base, folder / f"adapter-{i}", rank, i) for i, rank in enumerate(ranks)]
    return Engine(config, base), folders


def save_adapter(base: BaseModel, folder: Path, rank: int, seed: int) -> Path:
    """A LoRA of random factors on all linears, written without PEFT; returns its folder."""
    factor, tensors = _Noise(seed), {}
    for path, site in base.sites.items():
        if site.kind is SiteKind.LINEAR and path.rsplit(".", 1)[-1] in LINEARS:
            key = f"base_model.model.{path}.lora"
            tensors[f"{key}_A.weight"] = factor(rank, site.in_features)
            tensors[f"{key}_B.weight"] = factor(site.out_features, rank)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(LINEARS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@cache
def _pool() -> Tensor:
    """Drawn once: 64 adapters of an 8B base have billions of numbers."""
    return 0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()


class _Noise:
    """Matrices out of the pool, other ones for each seed."""

    def __init__(self, seed: int) -> None:
        self._at = seed * 7919

    def __call__(self, rows: int, columns: int) -> Tensor:
        at = self._at % (len(_pool()) - rows * columns)
        self._at += rows * columns
        return _pool()[at : at + rows * columns].view(rows, columns).clone()


def measure(engine: Engine, rows: int, folders: Sequence[Path], steps: int, rounds: int = _ROUNDS) -> dict[str, Any]:
    """Milliseconds a step and tokens per second: the base with and without adapters beside it, and the adapters."""
    without, beside, mixed = [], [], []
    for _ in range(rounds):
        _unload(engine, folders)
        without.append(_seconds(engine, rows, (), steps))
        make_resident(engine, folders)
        beside.append(_seconds(engine, rows, (), steps))
        mixed.append(_seconds(engine, rows, folders, steps))
    return {
        "rows": rows,
        "base, none loaded: ms a step": 1e3 * statistics.median(without),
        "base, adapters loaded: ms a step": 1e3 * statistics.median(beside),
        "adapters: ms a step": 1e3 * statistics.median(mixed),
        "base: tokens/s": rows / statistics.median(without),
        "adapters: tokens/s": rows / statistics.median(mixed),
        "base with adapters loaded / none, in time": ratio(beside, without),
        "adapters / base, in time": ratio(mixed, without),
    }


def _unload(engine: Engine, folders: Sequence[Path]) -> None:
    for folder in folders:
        engine.adapters.unload(adapter_use(folder).digest)


def _seconds(engine: Engine, rows: int, folders: Sequence[Path], steps: int) -> float:
    """Median seconds of a decode step of ``rows`` rows; each step ends with its tokens on the host."""
    if engine.runner.graphs is not None:  # what this step misses is captured before the ones that are timed
        _begin(engine, rows, folders, steps)
        engine.step()
        _end(engine, rows)
    _begin(engine, rows, folders, steps)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    _end(engine, rows)
    return statistics.median(times)


def _begin(engine: Engine, rows: int, folders: Sequence[Path], steps: int) -> None:
    """Bring ``rows`` sequences to where each of their next ``steps`` steps decodes a token."""
    while engine.runner.has_spare_work:  # graphs that the last round missed
        engine.step()
    sampling = SamplingParams(max_tokens=steps + rows + 2, temperature=0.0, ignore_eos=True)
    prompt = tuple(range(10, 10 + _PROMPT))
    for row in range(rows):
        uses = (adapter_use(folders[row % len(folders)]),) if folders else ()
        engine.add(Request(f"row-{row}", prompt, sampling, uses))
    while any(s.num_uncomputed > 1 for s in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()


def _overhead(engine: Engine, rows: int, folders: Sequence[Path], steps: int) -> dict[str, float]:
    """See overhead.measure; every row is under an adapter."""
    _begin(engine, rows, folders, steps)
    found = overhead.measure(engine, steps)
    _end(engine, rows)
    return found


def _end(engine: Engine, rows: int) -> None:
    """Raises RuntimeError where the steps did not have as many rows to the end: early ones decode beside the prompts of
    others."""
    running = len(engine.scheduler.running)
    for row in range(rows):
        engine.abort(f"row-{row}")
    while engine.has_work:
        engine.step()
    if running != rows:
        raise RuntimeError(f"{running} of {rows} rows were left after the steps")
