"""Linear products of a decode step of one to four rows: the Triton kernel where a trial at start finds it faster.

The plain twin is torch's linear. It serves all other steps, shapes and types, and shapes whose trial fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from onebase.kernels.few_rows_kernels import few_rows_kernel

log = logging.getLogger("onebase.kernels")

MOST_ROWS = 4
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGN = 16  # elements: what in_features and x's row stride are a multiple of, for whole vectors; bytes, for pointers
_TRIAL_BYTES = 256 << 20  # of weights that a trial reads: more than a cache keeps
_REPLAYS = 5
_CLOSE = 2e-2  # largest difference from torch's linear in a trial, as a share of its largest value

Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, slots=True)
class Tile:
    """n: rows of W that a program takes; k: columns that it reads at once."""

    n: int
    k: int
    warps: int


@dataclass(frozen=True, slots=True)
class Shape:
    """rows: those that the kernel is compiled for, 1 or MOST_ROWS."""

    rows: int
    out_features: int
    in_features: int
    dtype: torch.dtype

    @classmethod
    def of(cls, rows: int, weight: Tensor) -> Shape:
        return cls(1 if rows == 1 else MOST_ROWS, weight.shape[0], weight.shape[1], weight.dtype)


TILES: Mapping[int, tuple[Tile, ...]] = {
    1: (Tile(2, 1024, 4), Tile(4, 1024, 4), Tile(8, 512, 4)),
    MOST_ROWS: (Tile(4, 512, 4), Tile(4, 1024, 8)),
}


class FewRows:
    """chosen: the tile for each shape where the kernel was faster; nothing is tried after the start."""

    __slots__ = ("_chosen",)

    def __init__(self, chosen: Mapping[Shape, Tile]) -> None:
        self._chosen = chosen

    @classmethod
    def on(cls, weights: Iterable[Tensor], clock: Clock | None = None) -> FewRows:
        """Tries every shape among a model's weights, [out_features, in_features] each. Never raises for a trial."""
        by_shape: dict[Shape, list[Tensor]] = {}
        for weight in weights:
            if _fits_weight(weight):
                by_shape.setdefault(Shape.of(1, weight), []).append(weight)
        chosen: dict[Shape, Tile] = {}
        for same in by_shape.values():
            for rows in TILES:
                tile = _fastest(rows, _enough(same), clock or graph_seconds)
                if tile is not None:
                    chosen[Shape.of(rows, same[0])] = tile
        return cls(chosen)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias. x: [..., in_features] -> [..., out_features]."""
        rows = x.numel() // max(1, x.shape[-1])
        tile = self._chosen.get(Shape.of(rows, weight)) if 0 < rows <= MOST_ROWS else None
        if tile is None or x.dtype is not weight.dtype or not _fits_weight(weight):
            return linear(x, weight, bias)
        flat = x.reshape(rows, x.shape[-1])
        if flat.stride(1) != 1 or flat.stride(0) % _ALIGN or flat.data_ptr() % _ALIGN:
            flat = flat.clone(memory_format=torch.contiguous_format)
        return run(flat, weight, bias, tile).view(*x.shape[:-1], weight.shape[0])


def run(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    """One launch. x: [1 to 4 rows, in_features], whole vectors."""
    rows, (out_features, in_features) = x.shape[0], weight.shape
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    few_rows_kernel[(-(-out_features // tile.n),)](
        x, weight, weight if bias is None else bias, out, rows, x.stride(0), out_features, in_features,
        ROWS=1 if rows == 1 else MOST_ROWS, BLOCK_N=tile.n, BLOCK_K=tile.k, HAS_BIAS=bias is not None,
        num_warps=tile.warps,
    )  # fmt: skip
    return out


def graph_seconds(step: Callable[[], object]) -> float:
    """The device's time for a step that is captured once and replayed: launches are not in it."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(_REPLAYS):
        graph.replay()
    stop.record()
    stop.synchronize()
    milliseconds: float = start.elapsed_time(stop)
    return milliseconds / 1e3 / _REPLAYS


def _fits_weight(weight: Tensor) -> bool:
    whole = weight.is_contiguous() and weight.shape[1] % _ALIGN == 0 and weight.data_ptr() % _ALIGN == 0
    return whole and weight.dtype in _DTYPES


def _enough(weights: list[Tensor]) -> list[Tensor]:
    """Several of one shape: between two reads of one lie those of the others, as in a step."""
    return weights[: max(1, _TRIAL_BYTES // max(1, weights[0].nbytes))]


def _fastest(rows: int, weights: list[Tensor], clock: Clock) -> Tile | None:
    """None for torch's linear."""
    best = None
    try:
        x = torch.randn(rows, weights[0].shape[1], device=weights[0].device).to(weights[0].dtype)
        seconds = clock(lambda: [linear(x, weight) for weight in weights])
        for tile in TILES[rows]:
            _check(run(x, weights[0], None, tile), linear(x, weights[0]))
            taken = clock(lambda tile=tile: [run(x, weight, None, tile) for weight in weights])  # type: ignore[misc]
            if taken < seconds:
                best, seconds = tile, taken
        if best is not None:
            run(x, weights[0], weights[0][:, 0].contiguous(), best)  # compiled here, not while a graph is captured
    except Exception as error:  # a compiler that is not there, a device that lacks something: torch's linear stays
        log.info("few rows: torch's linear is used: %s: %s", type(error).__name__, error)
        return None
    return best


def _check(got: Tensor, wanted: Tensor) -> None:
    worst = float((got.float() - wanted.float()).abs().max())
    if not worst <= _CLOSE * float(wanted.abs().max()):
        raise ValueError(f"the kernel differs from torch's linear by {worst:.3g}")
