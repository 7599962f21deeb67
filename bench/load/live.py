"""How a run goes on: a table on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from onebase.bench.load.run import View
from onebase.bench.load.timeline import Row
from onebase.bench.load.worker import Progress

LINE_SECONDS = 5.0
RECENT = 10.0  # seconds that latencies and rates look back
_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 60


@dataclass(frozen=True, slots=True)
class _Moment:
    at: float
    tokens: int
    ended: int
    first: tuple[float, ...]


class Recent:
    """The last seconds of a run as rates and percentiles."""

    def __init__(self) -> None:
        self._moments: deque[_Moment] = deque([_Moment(0.0, 0, 0, ())])
        self.rates: deque[float] = deque(maxlen=_WIDTH)  # tokens a second, one a second

    def add(self, seconds: float, progress: Progress) -> None:
        ended = progress.ok + progress.cancelled + progress.rejected + progress.failed
        self._moments.append(_Moment(seconds, progress.tokens, ended, tuple(progress.first)))
        while len(self._moments) > 2 and self._moments[0].at < seconds - RECENT:
            self._moments.popleft()
        if int(seconds) > int(self._moments[-2].at):
            self.rates.append(self.rate("tokens", 1.0))

    def rate(self, what: str, back: float = RECENT) -> float:
        """``tokens`` or ``ended`` a second."""
        last = self._moments[-1]
        first = next(one for one in self._moments if one.at >= last.at - back - 0.5 or one is last)
        return float(getattr(last, what) - getattr(first, what)) / max(last.at - first.at, 1e-9)

    def ttft(self, percent: float) -> float | None:
        values = [value for moment in self._moments for value in moment.first]
        return float(np.percentile(values, percent)) if values else None


class Lines:
    """A line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._recent = Recent()
        self._next = LINE_SECONDS

    def update(self, seconds: float, progress: Progress, gauges: Row) -> None:
        self._recent.add(seconds, progress)
        if seconds >= self._next:
            self._next += LINE_SECONDS
            counts = ", ".join(f"{name} {value}" for name, value in _counts(progress).items())
            rates = f"{self._recent.rate('tokens'):.0f} tokens/s, TTFT p50 {_time(self._recent.ttft(50))}"
            self._console.print(f"{seconds:.0f} s: {counts}; {rates}", highlight=False)


class Board:
    """A table that is drawn again and again."""

    def __init__(self, live: Live, title: str) -> None:
        self._live = live
        self._title = title
        self._recent = Recent()

    def update(self, seconds: float, progress: Progress, gauges: Row) -> None:
        self._recent.add(seconds, progress)
        self._live.update(self._panel(seconds, progress, gauges))

    def _panel(self, seconds: float, progress: Progress, gauges: Row) -> Panel:
        recent = self._recent
        table = Table.grid(padding=(0, 2))
        table.add_row("requests", *(f"{name} [bold]{value}[/]" for name, value in _counts(progress).items()))
        table.add_row(
            f"last {RECENT:.0f} s",
            f"[bold]{recent.rate('tokens'):.0f}[/] tokens/s",
            f"[bold]{recent.rate('ended'):.1f}[/] requests/s",
            f"TTFT p50 [bold]{_time(recent.ttft(50))}[/]",
            f"p99 [bold]{_time(recent.ttft(99))}[/]",
        )
        if gauges:
            table.add_row("server", *(f"{name} [bold]{value}[/]" for name, value in _gauges(gauges).items()))
        error = Text(f"last error: {progress.last_error}"[:200], "red") if progress.last_error else Text()
        return Panel(
            Group(table, Text(f"tokens/s {bars(recent.rates)}"), error), title=f"{self._title}, {seconds:.0f} s"
        )


@contextmanager
def view(console: Console, title: str) -> Iterator[View]:
    """What fits the console."""
    if not console.is_terminal:
        yield Lines(console)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield Board(live, title)


def bars(values: Iterable[float]) -> str:
    """A character each, as high as it is beside the largest."""
    known = list(values)
    most = max(known, default=0.0) or 1.0
    return "".join(_BARS[round(max(0.0, value) / most * (len(_BARS) - 1))] for value in known)


def _counts(progress: Progress) -> dict[str, int]:
    ended = {name: getattr(progress, name) for name in ("ok", "rejected", "failed", "cancelled")}
    shown = {name: count for name, count in ended.items() if count or name == "ok"}
    return {"sent": progress.sent, "under way": progress.sent - sum(ended.values()), **shown}


def _gauges(gauges: Row) -> dict[str, str]:
    shown = {name: f"{gauges[name]:.0f}" for name in ("running", "waiting") if name in gauges}
    if "kv_cache_usage" in gauges:
        shown["KV"] = f"{gauges['kv_cache_usage']:.0%}"
    if "tier_device_adapters" in gauges:
        shown["adapters on device"] = f"{gauges['tier_device_adapters']:.0f}"
    return shown


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
