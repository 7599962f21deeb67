"""The registry's methods block. They run in threads of their own, so that no upload that is checked holds them up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

THREADS = 4  # the registry does one thing at a time; the others have something to do when it is between two

P = ParamSpec("P")
T = TypeVar("T")


class RegistryCalls:
    """Every request for an adapter waits for one of these. What takes long (staging, deleting files) goes elsewhere."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "registry")

    async def __call__(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        work = partial(method, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False)
