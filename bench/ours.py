"""Drives our engine in this process, as a closed loop of clients."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onebase.serve.engine.engine import Engine
from onebase.serve.engine.messages import (
    AdapterReady,
    AdapterUse,
    Failure,
    LoadAdapter,
    Request,
    SamplingParams,
    TokenOutput,
)

_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class Run:
    """One closed-loop run: wall seconds and tokens generated."""

    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def adapter_use(folder: Path) -> AdapterUse:
    """A folder as a request names it; a digest of its path stands for that of its content."""
    return AdapterUse(hashlib.sha256(str(folder).encode()).hexdigest(), str(folder))


def make_resident(engine: Engine, folders: Sequence[Path]) -> None:
    """Load adapters and wait until all are on the device."""
    uses = [adapter_use(folder) for folder in folders]
    entries = [engine.adapters.fetch(use.digest, use.path) for use in uses]
    while engine.adapters.busy:
        raise_failures(engine.step())
        time.sleep(0.001)
    for entry in entries:
        if entry.error is not None:
            raise entry.error
    if len(engine.adapters.resident()) < len(folders):
        raise RuntimeError(f"the {len(folders)} adapters do not fit the device budget together")


def load_all(engine: Engine, folders: Sequence[Path], at_once: int = 4) -> None:
    """Have every adapter compiled, as an upload does, whether or not they fit the device together."""
    left, asked = deque(folders), 0
    while left or asked:
        while left and asked < at_once:
            use = adapter_use(left.popleft())
            asked += 1 - _answered(engine.load(LoadAdapter(use.digest, use)))
        asked -= _answered(engine.step())
        time.sleep(0.001)  # as the server's loop does while nothing runs: the threads that compile want the interpreter


def _answered(outputs: Sequence[object]) -> int:
    raise_failures(outputs)
    return sum(isinstance(output, AdapterReady) for output in outputs)


def closed_loop(
    engine: Engine, prompts: Sequence[Sequence[int]], adapters: Sequence[Path | None], tokens_out: int, clients: int
) -> Run:
    """``clients`` clients, each sending its next request when its last one is done."""
    waiting = deque(
        Request(
            f"bench-{next(_ids)}",
            tuple(prompt),
            SamplingParams(max_tokens=tokens_out, temperature=0.0, ignore_eos=True),
            (adapter_use(adapter),) if adapter else (),
        )
        for prompt, adapter in zip(prompts, adapters, strict=True)
    )
    start, tokens, running = time.perf_counter(), 0, 0
    while waiting or running:
        while waiting and running < clients:
            raise_failures(engine.add(waiting.popleft()))
            running += 1
        outputs = engine.step()
        raise_failures(outputs)
        done = [output for output in outputs if isinstance(output, TokenOutput)]
        tokens += sum(len(output.tokens) for output in done)
        running -= sum(output.finish_reason is not None for output in done)
    return Run(time.perf_counter() - start, tokens)


def raise_failures(outputs: Sequence[object]) -> None:
    """Raises RuntimeError for the first Failure among an engine's outputs."""
    for output in outputs:
        if isinstance(output, Failure):
            raise RuntimeError(output.message)
