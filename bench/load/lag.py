"""How late an event loop wakes up: what it adds to latencies that it measures."""

from __future__ import annotations

import asyncio
import time

INTERVAL = 0.01


async def watch_lag(samples: list[float]) -> None:
    """Append, a hundred times a second, how much later than asked the loop woke up. Runs until it is cancelled."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(INTERVAL)
        samples.append(max(0.0, time.perf_counter() - before - INTERVAL))
