"""The order of a step: forward, delivery, drawing. With one step under way, or without.

Plain: forward(N), draw(N), deliver N. Overlapped: forward(N + 1), deliver N, draw(N + 1). So while the device computes
a step the host delivers the one before it and makes the one after it, and the tokens between two forwards stay on the
device. The host then schedules before it has seen the last tokens: a sequence that a stop token ends has one row too
many, which nobody reads. What it held is free at once: the device does what it is told in order.

A step that raises is run again in halves by the plain loop, see recovery.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from torch import Tensor

from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.classes import Classes
from onebase.serve.engine.delivery import Delivery, Told
from onebase.serve.engine.draw import Pending
from onebase.serve.engine.inputs import Unseen
from onebase.serve.engine.prompts import Scores
from onebase.serve.engine.recovery import Trouble
from onebase.serve.engine.runner import ModelRunner
from onebase.serve.engine.scheduler import Scheduler
from onebase.serve.engine.sequence import Sequence, Status
from onebase.serve.engine.speculation import Speculation
from onebase.serve.engine.stats import Counters
from onebase.serve.engine.upload import upload

T = TypeVar("T")
Begin = Callable[[Tensor, Rows[Sequence], Rows[int]], Pending]


@dataclass(frozen=True, slots=True, eq=False)
class _Launched:
    """A forward that the device has been told of. logits: a row for each sequence of ``sampling``; None without any.
    started: when it was launched, in seconds."""

    started: float
    chunks: list[Chunk]
    scores: Scores
    classes: Classes
    logits: Tensor | None
    sampling: list[Chunk]


@dataclass(frozen=True, slots=True, eq=False)
class _Drawing:
    """The step under way. pending: of ``sampling``, a row each; None without any. started: see _Launched."""

    started: float
    chunks: list[Chunk]
    scores: Scores
    classes: Classes
    pending: Pending | None
    sampling: list[Chunk]

    def unseen(self) -> Unseen | None:
        if self.pending is None:
            return None
        return Unseen(self.pending.tokens, {chunk.sequence: row for row, chunk in enumerate(self.sampling)})


class Pipeline:
    """Runs scheduled steps and delivers them. Used by the engine's thread."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        delivery: Delivery,
        begin: Begin,
        counters: Counters,
        *,
        speculation: Speculation | None,
        overlap: bool,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._delivery = delivery
        self._begin = begin
        self._counters = counters
        self._speculation = speculation
        self._overlap = overlap
        self._under_way: _Drawing | None = None
        self._delivered = 0.0  # when the last tokens came

    @property
    def busy(self) -> bool:
        """Whether a step is still to be delivered to anybody."""
        drawing = self._under_way
        return drawing is not None and any(chunk.sequence.status is not Status.FINISHED for chunk in drawing.chunks)

    def step(self, chunks: list[Chunk]) -> list[Told]:
        """Run a step, which may be empty, and deliver what is due: this one, or the one before it."""
        if self._speculation is not None:
            chunks = self._speculation.lengthened(chunks)
        launched = self._tried(partial(self._launch, chunks)) if chunks else None
        told = self._deliver()
        trouble = self._go_on(chunks, launched)
        if trouble is not None:
            return [*told, *self._again(chunks, trouble)]
        return told if self._overlap else [*told, *self._deliver()]

    def _go_on(self, chunks: list[Chunk], launched: _Launched | Trouble | None) -> Trouble | None:
        """Draw for a forward and count it, or say why there is none. None: no step was asked for, or all is well."""
        drawing = self._tried(partial(self._draw, launched)) if isinstance(launched, _Launched) else launched
        if drawing is None or isinstance(drawing, Trouble):
            return drawing
        self._under_way = drawing
        self._counters.steps += 1
        self._scheduler.limit.grow()
        begun = [chunk for chunk in chunks if chunk.start < chunk.sequence.start_len]
        self._counters.prompt_tokens += sum(one.sequence.prompt_tokens(one.start, one.stop) for one in begun)
        self._scheduler.computed(chunks)
        return None

    def _tried(self, work: Callable[[], T]) -> T | Trouble:
        try:
            return work()
        except Exception as error:  # whatever it is, it is nobody's but this step's
            trouble = Trouble.of(error)
        self._runner.recover()
        return trouble

    def _again(self, chunks: list[Chunk], trouble: Trouble) -> list[Told]:
        """Chunks that failed together, in two parts, each by the plain loop; what cannot be cut fails. Nothing is under
        way meanwhile, so the host knows every token."""
        if trouble.out_of_memory:
            self._counters.memory_failures += 1
            self._scheduler.limit.shrink(sum(chunk.num_tokens for chunk in chunks))
        if any(chunk.drafts for chunk in chunks):
            return self._alone([chunk.without_drafts() for chunk in chunks])
        if len(chunks) > 1:
            middle = len(chunks) // 2
            return [*self._alone(chunks[:middle]), *self._alone(chunks[middle:])]
        whole = chunks[0]
        if not trouble.out_of_memory or whole.num_tokens == 1:
            return [self._delivery.failed(whole.sequence, trouble.told())] if _goes_on(whole) else []
        half = whole.num_tokens // 2
        told = self._alone([Chunk(whole.sequence, half, samples=False)])
        return [*told, *self._alone([Chunk(whole.sequence, whole.num_tokens - half, whole.samples)])]

    def _alone(self, chunks: list[Chunk]) -> list[Told]:
        """The plain loop over those that go on."""
        chunks = list(filter(_goes_on, chunks))
        if not chunks:
            return []
        trouble = self._go_on(chunks, self._tried(partial(self._launch, chunks)))
        return self._deliver() if trouble is None else self._again(chunks, trouble)

    def _launch(self, chunks: list[Chunk]) -> _Launched:
        started = time.perf_counter()
        unseen = None if self._under_way is None else self._under_way.unseen()
        logits = self._runner.forward(chunks, unseen)
        sampling = [chunk for chunk in chunks if chunk.samples]
        return _Launched(started, chunks, self._runner.scores, self._runner.classes, logits, sampling)

    def _draw(self, launched: _Launched) -> _Drawing:
        """Begin to draw for those that go on."""
        logits, told = launched.logits, (launched.started, launched.chunks, launched.scores, launched.classes)
        going_on = [chunk for chunk in launched.sampling if chunk.sequence.status is not Status.FINISHED]
        if logits is None or not going_on:
            return _Drawing(*told, None, [])
        if len(going_on) < len(launched.sampling):  # overlapped, so that none has drafts
            rows = [row for row, one in enumerate(launched.sampling) if one.sequence.status is not Status.FINISHED]
            logits = logits[upload(np.asarray(rows), logits.device)]
        sequences, ahead = _rows(going_on)
        pending = self._begin(logits, sequences, ahead)
        for chunk in going_on:
            chunk.sequence.num_unseen = 1
        return _Drawing(*told, pending, going_on)

    def _deliver(self) -> list[Told]:
        """Deliver the step under way, if there is one."""
        drawing, self._under_way = self._under_way, None
        if drawing is None:
            return []
        drawn = [] if drawing.pending is None else drawing.pending.result()
        self._observe(drawing)
        told = self._delivery.prompts(drawing.chunks, drawing.scores, drawing.classes)
        return [*told, *self._delivery.tokens(drawing.sampling, drawn)]

    def _observe(self, drawing: _Drawing) -> None:
        """What the step took: since the one before it was delivered, where that was after its launch."""
        now = time.perf_counter()
        self._scheduler.observe(drawing.chunks, now - max(drawing.started, self._delivered))
        self._delivered = now


def _rows(chunks: Rows[Chunk]) -> tuple[list[Sequence], Rows[int]]:
    """The sequence of each row that is drawn for, and how many drafts stand before it; empty: none anywhere."""
    if not any(chunk.drafts for chunk in chunks):
        return [chunk.sequence for chunk in chunks], ()
    sequences = [chunk.sequence for chunk in chunks for _ in range(chunk.num_draws)]
    return sequences, [number for chunk in chunks for number in range(chunk.num_draws)]


def _goes_on(chunk: Chunk) -> bool:
    return chunk.sequence.status is Status.RUNNING
