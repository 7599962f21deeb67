"""Rows of one decode step after another: what does not change between two steps is made once.

Invariant: while the same sequences decode their next tokens, on the page lists that they had and with their adapters
under the handles that they had, each row keeps its adapters and its page table only grows; positions and lengths grow
by one. A sequence that was preempted, or whose pages were moved, has another page list. Past its prompt a sequence has
the same adapters on every slot, see layout.py.

The plain way to the same inputs is ModelRunner._inputs, which takes any chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from operator import is_

import numpy as np
import torch

from onebase.kernels.decode_tables import DecodeTables
from onebase.kernels.plan import BatchPlan, Run
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.inputs import StepInputs, Unseen
from onebase.serve.engine.upload import upload

MakePlan = Callable[[list[Run]], BatchPlan | None]


class DecodeRows:
    """Of chunks in adapter order, all of them decodes past the prompt. runs: what they are to the adapters."""

    def __init__(self, chunks: Rows[Chunk], page_size: int, device: torch.device, make_plan: MakePlan) -> None:
        """make_plan: of runs; None for those of base rows only."""
        self.runs: list[Run] = [run for chunk in chunks for run in chunk.sequence.runs(chunk.start, chunk.stop)]
        self._device = device
        self._plan = make_plan(self.runs)
        self._sequences = [chunk.sequence for chunk in chunks]
        self._pages = [sequence.pages for sequence in self._sequences]
        self._entries = list(dict.fromkeys(entry for sequence in self._sequences for entry in sequence.adapters))
        self._handles = self._present_handles()
        self._tables = DecodeTables([chunk.stop for chunk in chunks], self._pages, page_size, device)
        self._positions = np.array([chunk.sequence.placed.position(chunk.start) for chunk in chunks], dtype=np.int64)
        self._all = upload(np.arange(len(chunks)), device)

    @classmethod
    def of(cls, chunks: Rows[Chunk], page_size: int, device: torch.device, make_plan: MakePlan) -> DecodeRows | None:
        """None where they are something else."""
        return cls(chunks, page_size, device, make_plan) if all(map(_is_decode, chunks)) else None

    def in_order(self, chunks: Rows[Chunk]) -> list[Chunk] | None:
        """These chunks in the order of the rows, where they are the next tokens of the same sequences."""
        found = {chunk.sequence: chunk for chunk in chunks if chunk.num_tokens == 1}
        ordered = [found[sequence] for sequence in self._sequences if sequence in found]
        return ordered if len(ordered) == len(self._sequences) == len(chunks) else None

    def follow(self, chunks: Rows[Chunk]) -> bool:
        """Move on to these chunks, if they are the same rows one step later."""
        if len(chunks) != len(self._sequences) or not self._is_next(chunks):
            return False
        self._tables.advance()
        self._positions += 1
        return True

    def _is_next(self, chunks: Rows[Chunk]) -> bool:
        decoding = [chunk.sequence for chunk in chunks if chunk.num_tokens == 1 and chunk.samples]
        return (
            decoding == self._sequences
            and [chunk.start for chunk in chunks] == self._tables.kv_lens
            and all(map(is_, [sequence.pages for sequence in decoding], self._pages))
            and self._present_handles() == self._handles
        )

    def _present_handles(self) -> list[tuple[int, int]]:
        """They change where an adapter's block moves."""
        return [(entry.handle, entry.tail) for entry in self._entries]

    def inputs(self, unseen: Unseen | None, chunks: Rows[Chunk]) -> StepInputs:
        """Of the step that it stands at; all its rows reach the output head. On a CPU good until the next step."""
        ids = [0 if sequence.num_unseen else sequence.tokens[-1] for sequence in self._sequences]
        on_device = upload(np.array(ids, dtype=np.int64), self._device)
        return StepInputs(
            ids=on_device if unseen is None else unseen.put(on_device, chunks),
            virtual=None,
            positions=upload(self._positions, self._device),
            logits_rows=self._all,
            attention=self._tables.batch(),
            rows=self._plan,
            logits=self._plan,
        )


def _is_decode(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    past = chunk.samples and chunk.num_tokens == 1 and chunk.start >= sequence.start_len
    return past and not sequence.is_read
