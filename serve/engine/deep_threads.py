"""Threads with room for deep recursion, for compilers that recurse along what strangers wrote."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

STACK_BYTES = 256 << 20  # of address space: memory is taken only as far as a stack grows


def deep_threads(count: int, name: str) -> ThreadPoolExecutor:
    """All of them are started at once: the size of a stack is a setting of the process, read at a thread's start."""
    started = Barrier(count + 1)
    before = threading.stack_size(STACK_BYTES)
    try:
        pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        for _ in range(count):
            pool.submit(started.wait)
    finally:
        threading.stack_size(before)
    started.wait()
    return pool
