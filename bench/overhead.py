"""What a decode step costs beside the forward, part by part.

The engine has no clocks of its own: its parts are wrapped for as long as the measurement lasts. The time of a part is
the thread's own CPU time, without that of the parts inside it; the forward's is told apart.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

from onebase.serve.engine.decode_rows import DecodeRows
from onebase.serve.engine.engine import Engine

PARTS = ("poll", "schedule", "stage", "sample", "deliver", "encode", "rest")


class Clock:
    """Seconds by part of the present step; calls may nest. The clock is the calling thread's CPU time."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts as the part's."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()

        return timed

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        self._turn()
        self._open.append(part)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        """What went by belongs to the innermost part."""
        now = time.thread_time()
        if self._open:
            self.spent[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def clocked(engine: Engine, parts: Collection[str]) -> Iterator[Clock]:
    """An engine of which these parts are timed, and the forward."""
    clock, pipeline = Clock(), engine._pipeline
    places = [
        (engine, "_poll_adapters", "poll"),
        (engine.scheduler, "schedule", "schedule"),
        (engine.scheduler, "computed", "schedule"),
        (engine.runner, "in_adapter_order", "schedule"),
        (engine.runner, "_inputs", "stage"),
        (engine.runner, "_following", "stage"),
        (DecodeRows, "inputs", "stage"),
        (engine.runner, "_forward", "forward"),
        (pipeline, "_begin", "sample"),
        (pipeline, "_deliver", "deliver"),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            if part in parts or part == "forward":
                stack.enter_context(patch.object(owner, name, clock.wrap(part, getattr(owner, name))))
        yield clock


def measure(engine: Engine, steps: int) -> dict[str, float]:
    """Median milliseconds of the thread's CPU time, over the engine's next steps, which must be alike: each part and
    the forward in half of them; in the others all parts together, with the forward alone told apart, since each time
    that a clock is read costs something too."""
    found = _spent(engine, -(-steps // 2), PARTS)
    whole = _spent(engine, max(1, steps // 2), ())
    return {**{part: found[part] for part in (*PARTS, "forward")}, "overhead": whole["rest"]}


def _spent(engine: Engine, steps: int, parts: Collection[str]) -> dict[str, float]:
    """rest: what is in no part."""
    from onebase.serve.engine import wire  # needs the HTTP stack's packages; the bench's other parts do not

    found: dict[str, list[float]] = defaultdict(list)
    with clocked(engine, parts) as clock:
        encode = clock.wrap("encode", wire.encode) if "encode" in parts else wire.encode
        for _ in range(steps):
            clock.spent.clear()
            with clock.counting("rest"):
                encode(engine.step())
            for part in (*PARTS, "forward"):
                found[part].append(1e3 * clock.spent[part])
    return {part: statistics.median(times) for part, times in found.items()}
