"""What a decode step costs beside the forward, part by part.

The engine has no clocks of its own: its parts are wrapped for as long as the measurement lasts. The time of a part is
the thread's own CPU time, without that of the parts inside it; the forward's is told apart.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

from onebase.serve.engine.decode_rows import DecodeRows
from onebase.serve.engine.engine import Engine

PARTS = ("poll", "schedule", "plan", "stage", "sample", "deliver", "encode", "rest")


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
def clocked(engine: Engine) -> Iterator[Clock]:
    """An engine whose parts are timed."""
    clock, pipeline = Clock(), engine._pipeline
    places = [
        (engine, "_poll_adapters", "poll"),
        (engine.scheduler, "schedule", "schedule"),
        (engine.scheduler, "computed", "schedule"),
        (engine.runner, "in_adapter_order", "schedule"),
        (engine.runner, "_inputs", "stage"),
        (engine.runner, "_following", "stage"),
        (DecodeRows, "inputs", "stage"),
        (engine.runner, "_plan", "plan"),
        (engine.runner, "_forward", "forward"),
        (pipeline, "_begin", "sample"),
        (pipeline, "_deliver", "deliver"),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, clock.wrap(part, getattr(owner, name))))
        yield clock


def measure(engine: Engine, steps: int) -> dict[str, float]:
    """Median milliseconds of the thread's CPU time: each part of the engine's next steps, which must be alike, all of
    them together, and the forward."""
    from onebase.serve.engine import wire  # needs the HTTP stack's packages; the bench's other parts do not

    found: dict[str, list[float]] = defaultdict(list)
    with clocked(engine) as clock:
        for _ in range(steps):
            clock.spent.clear()
            with clock.counting("rest"):
                outputs = engine.step()
                with clock.counting("encode"):
                    wire.encode(outputs)
            for part in (*PARTS, "forward"):
                found[part].append(1e3 * clock.spent[part])
            found["overhead"].append(1e3 * sum(clock.spent[part] for part in PARTS))
    return {part: statistics.median(times) for part, times in found.items()}
