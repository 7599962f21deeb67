"""The low-rank kernels by themselves: time, bytes, share of the device's copy bandwidth, beside four other ways.

Knows nothing of engines or models. Runs wherever torch runs: the Triton body on CUDA, the CPU body elsewhere.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from onebase.bench.kernels_case import MIXED, Case, World, cases
from onebase.bench.kernels_clock import copy_bandwidth, medians
from onebase.bench.kernels_sides import DENSE, GATHER, GROUPED, LOOP, OURS, SERVED, sides
from onebase.bench.report import print_table, store
from onebase.kernels.dispatch import select_kernels

# On a CPU the whole grid takes over an hour; the other cases are there by their options.
HIDDEN = {"cuda": (1024, 4096, 8192), "cpu": (1024, 4096)}
RANKS = {"cuda": (8, 16, 64, MIXED), "cpu": (8, 64, MIXED)}
ROWS = {"cuda": (1, 16, 64, 256, 4096), "cpu": (1, 16, 64)}
SHARES = ("one", "half", "all")
_COLD_BYTES = {"cuda": 1 << 29, "cpu": 1 << 27}  # beyond any cache
_MOST_BYTES = {"cuda": 24 << 30, "cpu": 2 << 30}  # of a case's factors; larger cases are left out
_WIDTH = 116
_OTHERS = (SERVED, LOOP, GATHER, GROUPED, DENSE)

Result = dict[str, Any]


def run(
    device: str,
    *,
    hidden: Sequence[int] = (),
    ranks: Sequence[int] = (),
    rows: Sequence[int] = (),
    shares: Sequence[str] = SHARES,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 5,
    out: Path | None = None,
    table: Path | None = None,
    plot: Path | None = None,
) -> list[Result]:
    """Print the grid; store it as JSON (out), CSV (table) and a picture (plot). Empty axes: the device's usual ones.

    Files are written after each case, so that a run that is cut off leaves what it has measured."""
    kind = torch.device(device)
    bandwidth = copy_bandwidth(kind)
    grid = list(cases(hidden or HIDDEN[kind.type], ranks or RANKS[kind.type], rows or ROWS[kind.type], shares))
    fits = [case for case in grid if case.floor_bytes(dtype.itemsize) <= _MOST_BYTES[kind.type]]
    result: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "dtype": str(dtype)}
    result["left_out"] = [asdict(case) for case in grid if case not in fits]
    results: list[Result] = []
    for case in fits:
        with torch.inference_mode():
            results.append(measure(case, dtype, kind, rounds, bandwidth))
        store(out, "kernels", result | {"results": results})
        if table is not None:
            _write_csv(table, results)
    _show(results, bandwidth)
    if len(fits) < len(grid):
        print(f"left out, over {_MOST_BYTES[kind.type] >> 30} GiB of factors: {len(grid) - len(fits)} of {len(grid)}")
    if plot is not None:
        from onebase.bench.kernels_plot import draw

        draw(results, bandwidth, plot)
    return results


def measure(case: Case, dtype: torch.dtype, device: torch.device, rounds: int, bandwidth: float) -> Result:
    """Seconds of one site by each side, the floor in bytes, and how near ours is to reading them at copy speed."""
    world = World(case, dtype, device, _COLD_BYTES[device.type])
    times = medians(sides(world, select_kernels(world.tables)), device, rounds)
    seconds = {name: total / world.copies for name, total in times.items()}
    floor = case.floor_bytes(world.x.element_size())
    return {
        **asdict(case),
        "mean_rank": sum(case.ranks) / case.programs,
        "floor_bytes": floor,
        "share_of_copy_bandwidth": floor / seconds[OURS] / bandwidth,
        "captured_share_of_copy_bandwidth": floor / seconds[SERVED] / bandwidth if SERVED in seconds else None,
        "seconds": seconds,
    }


def _show(results: Sequence[Result], bandwidth: float) -> None:
    title = f"One site: shrink and expand. Copies move {bandwidth / 1e9:.0f} GB/s. Other columns: times as long as ours"
    columns = ("hidden", "rank", "rows", "adapters", "us", "MB", "% of copy", *_OTHERS)
    print_table(title, columns, [list(_cells(result)) for result in results], _WIDTH)


def _cells(result: Result) -> Iterator[str]:
    yield from (str(result["hidden"]), str(result["rank"] or "8-128"), str(result["rows"]), str(result["programs"]))
    yield f"{1e6 * result['seconds'][OURS]:.1f}"
    yield f"{result['floor_bytes'] / 1e6:.2f}"
    yield f"{100 * result['share_of_copy_bandwidth']:.0f}"
    for name in _OTHERS:
        seconds = result["seconds"].get(name)
        yield "-" if seconds is None else f"{seconds / result['seconds'][OURS]:.2f}"


def _write_csv(path: Path, results: Sequence[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = [{name: value for name, value in result.items() if name != "seconds"} for result in results]
    names = (OURS, *_OTHERS)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*flat[0], *(f"{name}, us" for name in names)])
        writer.writeheader()
        for row, result in zip(flat, results, strict=True):
            times = {name: result["seconds"].get(name) for name in names}
            writer.writerow(
                row | {f"{name}, us": seconds and round(1e6 * seconds, 3) for name, seconds in times.items()}
            )
