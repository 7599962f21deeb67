"""Answers as JSON: short ones at once, long ones in a thread, where they hold nobody up for more than a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from onebase.serve.api.state import Server

T = TypeVar("T")

LONG_ANSWER = 1 << 14  # values; shorter answers are written faster than a thread is woken


async def written(server: Server, num_values: int, write: Callable[[], T]) -> T:
    """What ``write`` gives: an answer of so many values, or a part of one."""
    if num_values <= LONG_ANSWER:
        return write()
    return await asyncio.get_running_loop().run_in_executor(server.parsers, write)
