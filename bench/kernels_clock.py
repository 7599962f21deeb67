"""How the kernel benchmark reads time: by graph replay and events on CUDA, by the clock on a CPU; sides in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from onebase.bench.kernels_sides import Side

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
_REPLAYS = 20


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes. On CUDA by a kernel: in a graph it would be a copy engine's
    work, which is slower by a third."""
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)

    def copy() -> None:
        target.copy_(source)

    clock = _events(copy) if device.type == "cuda" else _plain(copy)
    return 2 * source.numel() / statistics.median(clock() for _ in range(7))


def medians(sides: Mapping[str, Side], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of one call of each side. They take turns, so that what drifts meets all of them."""
    clocks = {name: _graph(side) if device.type == "cuda" else _plain(side) for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, clock in clocks.items():
            times[name].append(clock())
    return {name: statistics.median(values) for name, values in times.items()}


def _plain(side: Side) -> Callable[[], float]:
    side()

    def clock() -> float:
        start = time.perf_counter()
        side()
        return time.perf_counter() - start

    return clock


def _graph(side: Side) -> Callable[[], float]:
    """Launches cost nothing in a replay: what is left is what the device does."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        side()
        side()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side()
    return _events(graph.replay)


def _events(side: Side) -> Callable[[], float]:
    """The device's own time of one call."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def clock() -> float:
        start.record()
        for _ in range(_REPLAYS):
            side()
        stop.record()
        stop.synchronize()
        milliseconds: float = start.elapsed_time(stop)
        return milliseconds / 1e3 / _REPLAYS

    return clock
