"""Threads that bring adapters to host memory and copy them to the device, beside the engine's loop.

Copies have threads of their own: what is ready for the device does not wait for compilations that are not. Reads that
somebody waits for go before all others, so that uploads without end keep no request from its adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Barrier, Lock
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from onebase.adapters.tiers.entry import Copied
from onebase.adapters.tiers.installer import Installable

_READERS, _COPIERS = 2, 2
P = ParamSpec("P")
T = TypeVar("T")


class Loader:
    """``buffer`` is the arena's. Called by the engine's thread."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._readers = _ReadQueue(_serial_threads(_READERS, "adapter-read"))
        self._copiers = _serial_threads(_COPIERS, "adapter-copy")
        self._stream = torch.cuda.Stream() if buffer.is_cuda else None  # type: ignore[no-untyped-call]

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run something in a thread, in its turn."""
        return self._readers.submit(partial(work, *args, **kwargs))

    def hasten(self, future: Future[T]) -> None:
        """Somebody waits for what was submitted: it goes before all that nobody waits for."""
        self._readers.hasten(future)

    def copy(self, targets: Mapping[int, Tensor], prepare: Callable[[], Installable]) -> Future[Copied]:
        """Copy into the arena, after all that the device has been told so far, and prepare what the tables take.

        targets: start -> what goes there.
        """
        return self._copiers.submit(self._copy_and_prepare, targets, self._mark(), prepare)

    def close(self) -> None:
        for threads in (self._readers.threads, self._copiers):
            threads.shutdown(wait=True, cancel_futures=True)

    def _mark(self) -> torch.cuda.Event | None:
        """The kernels and moves queued so far: they may still read what lay in a block before."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _copy_and_prepare(
        self, targets: Mapping[int, Tensor], after: torch.cuda.Event | None, prepare: Callable[[], Installable]
    ) -> Copied:
        start = time.monotonic()
        self._copy(targets, after)
        return Copied(time.monotonic() - start, prepare())

    def _copy(self, targets: Mapping[int, Tensor], after: torch.cuda.Event | None) -> None:
        if self._stream is None or after is None:
            for start, data in targets.items():
                self._buffer[start : start + data.numel()].copy_(data)
            return
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for start, data in targets.items():
                self._buffer[start : start + data.numel()].copy_(data, non_blocking=True)
        self._stream.synchronize()  # of this thread: the engine's loop goes on


class _ReadQueue:
    """Two queues before one pool of threads; a thread that is free takes from the urgent one first."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.threads = threads
        self._lock = Lock()
        self._urgent: dict[Future[Any], Callable[[], Any]] = {}  # in their order
        self._other: dict[Future[Any], Callable[[], Any]] = {}

    def submit(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            self._other[future] = work
        self.threads.submit(self._run_next)
        return future

    def hasten(self, future: Future[T]) -> None:
        """Nothing changes where it has begun."""
        with self._lock:
            work = self._other.pop(future, None)
            if work is not None:
                self._urgent[future] = work

    def _run_next(self) -> None:
        with self._lock:
            queue = self._urgent or self._other
            future = next(iter(queue))
            work = queue.pop(future)
        try:
            future.set_result(work())
        except BaseException as error:  # told to who asks for the result, as an executor does
            future.set_exception(error)


def _serial_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads whose torch work is not parallel.

    Each thread that runs a parallel region gets a team of OpenMP workers of its own. With more workers than cores the
    runtime no longer spins at its barriers, and every parallel operation of the decode loop pays for a wake-up.
    torch.set_num_threads acts on the calling thread and on threads yet to come, so it is set back at the end.
    """
    num_threads = torch.get_num_threads()
    started = Barrier(count + 1)

    def become_serial() -> None:
        torch.get_num_threads()  # initialises this thread; later it would undo the next line
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix=name)
    for _ in range(count):
        pool.submit(become_serial)
    started.wait()
    torch.set_num_threads(num_threads)
    return pool
