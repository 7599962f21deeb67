"""The adapters' part of a decode step on the CPU: beside its floor, beside a loop, and while adapters come and go.

The floor: the adapters' factors read once, at the rate at which the base's own products read their weights here.
Nothing but the low-rank kernels and those products runs; data is random, shapes are the 135M Llama's.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from onebase.bench.report import ratio, show, store
from onebase.bench.workload import SHAPES, mixed_ranks
from onebase.kernels import huge_pages, prepack
from onebase.kernels.base import LowRankKernels
from onebase.kernels.cpu import CpuKernels
from onebase.kernels.cpu_tuning import CpuTuning
from onebase.kernels.dispatch import select_kernels
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import Operands, ProgramTables, SiteShape

_ALONE = CpuTuning(call=0.0, mask=1e9, gather=1e9)  # every segment by itself
_RANKS = (8, 16, 32, 64)
_EVERY = (16, 4, 1)  # steps between changes
_ROUNDS = 15


class Decoding:
    """Programs of the shape's linear sites in slots of an arena, and steps of one row per program."""

    def __init__(self, shape: str, slots: int) -> None:
        config = SHAPES[shape]
        h, kv, mid = config.hidden_size, config.hidden_size // config.num_attention_heads, config.intermediate_size
        kv *= config.num_key_value_heads
        groups = (((h, h), (h, kv), (h, kv)), ((h, h),), ((h, mid), (h, mid)), ((mid, h),))
        sites = [SiteShape(*site) for _ in range(config.num_hidden_layers) for group in groups for site in group]
        self._slot = max(_RANKS) * sum(site.in_features + site.out_features for site in sites)
        buffer = torch.empty(self._slot * slots, dtype=torch.bfloat16)
        huge_pages.advise(buffer)  # as a server's arena: before anything is written
        buffer.normal_(std=0.02)
        self.tables = ProgramTables(buffer, sites)
        self.groups = list(_numbered(groups, config.num_hidden_layers))
        self.live: list[int] = []
        self._slots: dict[int, int] = {}
        self._free = list(range(slots))
        self._next = 0
        widths = {site.in_features for site in sites} | {site.out_features for site in sites}
        self.rows = {width: torch.randn(slots, width).bfloat16() for width in widths}

    @property
    def plan(self) -> BatchPlan:
        return BatchPlan.from_rows([((handle, 1.0),) for handle in self.live])

    @property
    def factor_bytes(self) -> int:
        per_rank = sum(site.in_features + site.out_features for site in self.tables.sites)
        return 2 * per_rank * sum(self.tables.operands(handle)[0].rank for handle in self.live)

    def join(self, rank: int) -> None:
        handle, slot = self._next, self._free.pop()
        self._next += 1
        at, operands = slot * self._slot, {}
        for number, site in enumerate(self.tables.sites):
            operands[number] = Operands(rank, 2.0, at, at + rank * site.in_features)
            at += rank * (site.in_features + site.out_features)
        self.tables.install(handle, operands)
        self.live.append(handle)
        self._slots[handle] = slot

    def leave(self, handle: int, kernels: LowRankKernels) -> None:
        kernels.forget(handle)
        self.tables.remove(handle)
        self.live.remove(handle)
        self._free.append(self._slots.pop(handle))

    def step(self, kernels: LowRankKernels, plan: BatchPlan) -> None:
        for group in self.groups:
            x = self.rows[self.tables.sites[group[0]].in_features][: plan.num_rows]
            shrunk = kernels.shrink(x, group, plan)
            for site in group:
                kernels.expand(self.rows[self.tables.sites[site].out_features][: plan.num_rows], shrunk, site, plan)

    def base(self) -> Callable[[], None]:
        """The base's products of a step, as they are served."""
        ready = prepack.supported(torch.bfloat16)
        weights = [torch.randn(site.out_features, site.in_features).bfloat16() for site in self.tables.sites]
        packed = [prepack.prepack(weight) for weight in weights] if ready else weights
        product: Callable[[Tensor, Tensor], Tensor] = prepack.product if ready else linear

        def run() -> None:
            for site, weight in zip(self.tables.sites, packed, strict=True):
                product(self.rows[site.in_features][: len(self.live)], weight)

        return run


@torch.inference_mode()
def run(rows: int = 16, steps: int = 64, out: Path | None = None) -> dict[str, Any]:
    """Print and store both parts. Times are of the calling thread where it has only itself, else of the clock."""
    decoding = Decoding("135m", rows + 4)
    for rank in mixed_ranks(rows):
        decoding.join(rank)
    floor = _beside_the_floor(decoding)
    show(f"adapters of a decode step, {rows} rows of {rows} adapters", {k: f"{v:.2f}" for k, v in floor.items()})
    churn = {name: _spread(times) for name, times in _churn(decoding, steps)}
    show("ms a step: p50, p99, mean", {name: " ".join(f"{v:.1f}" for v in values) for name, values in churn.items()})
    result = {"rows": rows, "floor": floor, "churn": churn}
    store(out, "kernels-decode", result)
    return result


def _beside_the_floor(decoding: Decoding) -> dict[str, float]:
    plan, kernels, alone = decoding.plan, select_kernels(decoding.tables), CpuKernels(decoding.tables, _ALONE)
    base = decoding.base()
    sides: tuple[Callable[[], None], ...] = (
        lambda: decoding.step(kernels, plan),
        lambda: decoding.step(alone, plan),
        base,
    )
    for side in sides:
        side()
    times = [[_milliseconds(side) for side in sides] for _ in range(_ROUNDS)]
    ours, loop, products = (list(column) for column in zip(*times, strict=True))
    read = 2 * sum(site.in_features * site.out_features for site in decoding.tables.sites)
    floor = [value * decoding.factor_bytes / read for value in products]
    return {
        "ours, ms": statistics.median(ours),
        "floor, ms": statistics.median(floor),
        "ours / floor": ratio(ours, floor),
        "loop per adapter / floor": ratio(loop, floor),
    }


def _churn(decoding: Decoding, steps: int) -> Iterator[tuple[str, list[float]]]:
    kernels, rng, plan = select_kernels(decoding.tables), random.Random(0), decoding.plan
    for _ in range(4):
        decoding.step(kernels, plan)
    yield "none joins or leaves", [_milliseconds(lambda: decoding.step(kernels, plan)) for _ in range(steps)]
    for every in _EVERY:
        times = []
        for number in range(steps):
            if number % every == 0:
                decoding.leave(rng.choice(decoding.live), kernels)
                decoding.join(rng.choice(_RANKS))
                plan = decoding.plan
            times.append(_milliseconds(lambda plan=plan: decoding.step(kernels, plan)))  # type: ignore[misc]
        yield f"one leaves and one joins every {every} steps", times


def _milliseconds(call: Callable[[], None]) -> float:
    """Of this thread where torch runs in it alone, so that other work on the machine does not count."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return 1e3 * (clock() - start)


def _spread(times: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(times)
    return ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)], statistics.mean(ordered)


def _numbered(groups: Sequence[Sequence[tuple[int, int]]], layers: int) -> Iterator[tuple[int, ...]]:
    at = 0
    for _ in range(layers):
        for group in groups:
            yield tuple(range(at, at + len(group)))
            at += len(group)
