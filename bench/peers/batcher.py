"""A minimal batcher, as one writes it around `generate` in an afternoon: who waits when a batch ends is the next one.

Static batches: a batch takes as long as its longest answer, and nobody joins it on the way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, Queue

Emit = Callable[[int | Exception | None], None]  # a token; None: the end; else why there is no more


@dataclass(frozen=True, slots=True)
class Job:
    """adapter: none for the base. emit is called from the batcher's thread."""

    prompt: tuple[int, ...]
    tokens_out: int
    adapter: str | None
    emit: Emit


Generate = Callable[[Sequence[Job], Callable[[Sequence[int]], None]], None]
"""Computes a batch; calls back with one token a row after each step. Rows that want fewer tokens than the longest still
get theirs: the batcher drops what is too many."""


class Batcher:
    """size: rows of a batch. patience: seconds that the first one waits for others. Owns its thread."""

    def __init__(self, generate: Generate, size: int, patience: float = 0.01) -> None:
        self._generate = generate
        self._size = size
        self._patience = patience
        self._waiting: Queue[Job | None] = Queue()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        self._waiting.put(job)

    def close(self) -> None:
        """Ends after the batch that runs."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, last = self._gather(first)
            self._compute(batch)
            if last:
                return

    def _gather(self, first: Job) -> tuple[list[Job], bool]:
        """(the batch, whether it is the last one)."""
        batch, until = [first], time.monotonic() + self._patience
        while len(batch) < self._size:
            try:
                job = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                break
            if job is None:
                return batch, True
            batch.append(job)
        return batch, False

    def _compute(self, batch: Sequence[Job]) -> None:
        """Whatever happens to the computation, every answer ends, and the next batch is computed."""
        left = [job.tokens_out for job in batch]

        def step(tokens: Sequence[int]) -> None:
            for row, token in enumerate(tokens):
                if left[row] > 0:
                    left[row] -= 1
                    batch[row].emit(token)
                    if not left[row]:
                        batch[row].emit(None)

        failure: Exception | None = None
        try:
            self._generate(batch, step)
        except Exception as error:  # of the model: each of its requests gets it
            failure = error
        for job, missing in zip(batch, left, strict=True):
            if missing:
                job.emit(failure)
