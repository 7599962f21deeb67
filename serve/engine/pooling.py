"""Embeddings: the hidden states of a prompt as one vector, summed up over its chunks in float64.

What is read is what the output head reads, after the last norm. Virtual tokens of adapters are not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from onebase.serve.engine.layout import Layout
from onebase.serve.engine.messages import Request

if TYPE_CHECKING:
    from onebase.serve.engine.chunk import Chunk


@dataclass(slots=True)
class Pool:
    """What was read of one prompt. left: slots still to be read; count: how many were; total: their sum, float64
    [width], on the model's device."""

    left: range
    count: int = 0
    total: Tensor | None = None

    @classmethod
    def of(cls, request: Request, layout: Layout) -> Pool | None:
        """None for a request that wants no embedding."""
        if request.embeds is None:
            return None
        stop = layout.num_virtual + len(request.prompt)
        return cls(range(layout.num_virtual if request.embeds == "mean" else stop - 1, stop))

    def slots(self, start: int, stop: int) -> range:
        """Those of [start, stop) that are still to be read."""
        first = max(start, self.left.start)
        return range(first, max(first, min(stop, self.left.stop)))

    def add(self, rows: Tensor, last: int, *, one_by_one: bool) -> None:
        """Read rows [n, width], the last of which is slot ``last``. One by one: the sum does not depend on chunks."""
        total = torch.zeros_like(rows[0], dtype=torch.float64) if self.total is None else self.total
        for part in torch.split(rows.double(), 1 if one_by_one else len(rows)):
            total = total + part.sum(0)
        self.total, self.count = total, self.count + len(rows)
        self.left = range(last + 1, self.left.stop)

    def vector(self) -> bytes | None:
        """The mean of what was read: float32 [width] in the machine's byte order. None where it is not finite, or not
        all is read."""
        if self.total is None or self.left:
            return None
        mean = (self.total / self.count).cpu().numpy().astype(np.float32)
        return mean.tobytes() if np.isfinite(mean).all() else None


def wants_rows(chunk: Chunk) -> bool:
    """Whether any row of the chunk is read for an embedding."""
    pool = chunk.sequence.pool
    return pool is not None and bool(pool.slots(chunk.start, chunk.stop))


def pool_rows(chunks: Iterable[Chunk], hidden: Tensor, *, one_by_one: bool = False) -> None:
    """Read the rows of a step. hidden: [T, width], of all chunks, packed."""
    first = 0
    for chunk in chunks:
        pool = chunk.sequence.pool
        if pool is not None and (slots := pool.slots(chunk.start, chunk.stop)):
            at = first - chunk.start
            pool.add(hidden[at + slots.start : at + slots.stop], slots[-1], one_by_one=one_by_one)
        first += chunk.num_tokens
