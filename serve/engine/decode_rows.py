"""Rows of one decode step after another: what does not change between two steps is made once.

Invariant: while the same sequences decode their next tokens, on the page lists that they had and with their adapters
under the handles that they had, each row keeps its adapters and its page table only grows; positions and lengths grow
by one. A sequence that was preempted, or whose pages were moved, has another page list. Past its prompt a sequence has
the same adapters on every slot, see layout.py.

The plain way to the same inputs is ModelRunner._inputs, which takes any chunks.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from operator import is_

import numpy as np
import torch

from onebase.kernels.attention import AttentionBatch
from onebase.kernels.plan import BatchPlan, Run
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.inputs import StepInputs, Unseen
from onebase.serve.engine.upload import upload

_ROOM = 8  # pages that the tables have room for beyond those that are held


class DecodeRows:
    """Of chunks in adapter order, all of them decodes past the prompt. runs: what they are to the adapters."""

    def __init__(self, chunks: Rows[Chunk], page_size: int) -> None:
        self.runs: list[Run] = [run for chunk in chunks for run in chunk.sequence.runs(chunk.start, chunk.stop)]
        self._page_size = page_size
        self._sequences = [chunk.sequence for chunk in chunks]
        self._pages = [sequence.pages for sequence in self._sequences]
        self._entries = list(dict.fromkeys(entry for sequence in self._sequences for entry in sequence.adapters))
        self._handles = self._present_handles()
        self._starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        self._shifts = np.array([one.placed.position(0) for one in self._sequences], dtype=np.int64)
        self._ones = np.ones(len(chunks), dtype=np.int64)
        self._held = np.zeros(len(chunks), dtype=np.int64)  # pages of each row that are in its table
        self._tables = np.zeros((len(chunks), 0), dtype=np.int32)
        self._fill()

    @classmethod
    def of(cls, chunks: Rows[Chunk], page_size: int) -> DecodeRows | None:
        """None where they are something else."""
        return cls(chunks, page_size) if all(map(_is_decode, chunks)) else None

    def follow(self, chunks: Rows[Chunk]) -> bool:
        """Move on to these chunks, if they are the same rows one step later."""
        if len(chunks) != len(self._sequences) or not self._is_next(chunks):
            return False
        self._starts += 1
        self._fill()
        return True

    def _is_next(self, chunks: Rows[Chunk]) -> bool:
        decoding = [chunk.sequence for chunk in chunks if chunk.num_tokens == 1 and chunk.samples]
        return (
            decoding == self._sequences
            and all(map(is_, [sequence.pages for sequence in decoding], self._pages))
            and self._present_handles() == self._handles
            and [chunk.start - 1 for chunk in chunks] == self._starts.tolist()
        )

    def _present_handles(self) -> list[tuple[int, int]]:
        """They change where an adapter's block moves."""
        return [(entry.handle, entry.tail) for entry in self._entries]

    def _fill(self) -> None:
        """Bring the tables up to the pages that hold the rows' tokens."""
        needed = self._starts // self._page_size + 1
        missing = int(needed.max()) - self._tables.shape[1]
        if missing > 0:
            self._tables = np.pad(self._tables, ((0, 0), (0, missing + _ROOM)))
        for row in np.flatnonzero(needed > self._held).tolist():
            count = int(needed[row])
            self._tables[row, :count] = self._pages[row][:count]
        self._held = needed

    def inputs(
        self, plan: BatchPlan | None, unseen: Unseen | None, chunks: Rows[Chunk], device: torch.device
    ) -> StepInputs:
        """Of the step that it stands at; plan: of ``runs``, and so of the rows that reach the output head: all."""
        ids = [0 if sequence.num_unseen else sequence.tokens[-1] for sequence in self._sequences]
        on_device = upload(np.array(ids, dtype=np.int64), device)
        tables = self._tables[:, : int(self._held.max())].copy()
        return StepInputs(
            ids=on_device if unseen is None else unseen.put(on_device, chunks),
            virtual=None,
            positions=upload(self._starts + self._shifts, device),
            logits_rows=upload(np.arange(len(ids)), device),
            attention=AttentionBatch.of_tables(self._ones, self._starts + 1, tables, self._page_size, device),
            rows=plan,
            logits=plan,
        )


def _is_decode(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    past = chunk.samples and chunk.num_tokens == 1 and chunk.start >= sequence.start_len
    return past and not sequence.is_read
