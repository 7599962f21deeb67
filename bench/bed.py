"""What the lifecycle benchmark runs on: an engine with room for some adapters, and many more of them on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from onebase.adapters.formats import compile_folder
from onebase.adapters.packing import pack
from onebase.adapters.tiers.arena import BLOCK_ALIGN, aligned
from onebase.bench.drive import Job
from onebase.bench.ours import adapter_use, load_all
from onebase.bench.step import save_adapter
from onebase.bench.traffic import Arrival, Traffic
from onebase.bench.workload import random_model
from onebase.serve.engine.config import GIB, EngineConfig
from onebase.serve.engine.engine import Engine
from onebase.serve.model.loader import LoadedModel, prepare


@dataclass(frozen=True, slots=True)
class Plan:
    """registered: adapters on disk; room: how many fit the device; fit: how many the side without pressure has.

    requests: of one side in one round; clients: of the closed loops.
    """

    shape: str = "135m"
    device: str = "cpu"
    registered: int = 1000
    room: int = 100
    fit: int = 50
    rank: int = 8
    requests: int = 96
    clients: int = 16
    rounds: int = 3
    alphas: tuple[float, ...] = (0.3, 1.0)
    tokens_in: tuple[int, int] = (96, 161)
    tokens_out: tuple[int, int] = (48, 81)


@dataclass(slots=True)
class Bench:
    """An engine with room for ``plan.room`` adapters, and the folders of all of them."""

    plan: Plan
    engine: Engine
    folders: Sequence[Path]
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def jobs(self, arrivals: Sequence[Arrival], adapters: Sequence[int], *, timed: bool, watched: bool) -> list[Job]:
        """adapters: the index of each arrival's adapter. Prompts are random, so that no prefix is found again."""
        return [self._job(a, i, timed, watched) for a, i in zip(arrivals, adapters, strict=True)]

    def _job(self, arrival: Arrival, adapter: int, timed: bool, watched: bool) -> Job:
        prompt = tuple(int(token) for token in self.random.integers(10, self.engine.info.vocab_size, arrival.tokens_in))
        at = arrival.at if timed else None
        return Job(adapter_use(self.folders[adapter]), prompt, arrival.tokens_out, at, watched)

    def arrivals(self, adapters: int, alpha: float, count: int, rate: float, seed: int) -> list[Arrival]:
        plan = self.plan
        duration = (count + 0.5) / rate
        return Traffic(adapters, alpha, rate, duration, 1.0, plan.tokens_in, plan.tokens_out, seed).arrivals()


def make_bench(plan: Plan, folder: Path, room: int, registered: int, host_cache: float | None = None) -> Bench:
    """A fresh engine. Adapters are written once into ``folder``, and compiled once."""
    base = prepare(random_model(plan.shape, torch.bfloat16, plan.device), _config(plan, folder, 1.0, host_cache))
    folders = [folder / f"{plan.shape}-rank-{plan.rank}-{index}" for index in range(registered)]
    folder.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(folders):
        if not path.exists():
            save_adapter(base, path, plan.rank, index)
    room_gib = (room + 0.5) * _block_bytes(base, folders[0]) / GIB
    config = _config(plan, folder, room_gib, host_cache)
    bench = Bench(plan, Engine(config, base), folders)
    load_all(bench.engine, folders)
    return bench


def _config(plan: Plan, folder: Path, adapter_memory: float, host_cache: float | None) -> EngineConfig:
    return EngineConfig(
        model=plan.shape,
        device=plan.device,
        max_num_seqs=2 * plan.clients,
        max_model_len=1024,
        kv_memory=2.0,
        adapter_memory=adapter_memory,
        prefix_caching=False,
        compiled_dir=str(folder / "compiled"),
        host_cache=host_cache,
    )


def _block_bytes(base: LoadedModel, folder: Path) -> int:
    """Of one adapter in the arena."""
    packed = pack(compile_folder(folder, base, digest=""), base.dtype)
    return aligned(packed.data.numel(), BLOCK_ALIGN) * base.dtype.itemsize
