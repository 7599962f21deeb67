"""The attention batches of one decode step after another: in each of them every sequence is one token longer.

What does not change is kept, lengths and slots are counted up where they are, and a sequence that comes to its next
page gets that page's number. So a step costs the same few operations whatever the batch holds. The plain way to the
same batch is AttentionBatch.build.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from onebase.kernels.attention import AttentionBatch

_Views = tuple[Tensor, Tensor, Tensor, Tensor]


class DecodeTables:
    """One buffer of the host, as a step's batch wants it on its device: slots, query_starts, kv_lens, block_tables."""

    def __init__(
        self, kv_lens: Sequence[int], pages: Sequence[Sequence[int]], page_size: int, device: torch.device
    ) -> None:
        """kv_lens: tokens of each sequence after the first step, at least 1. pages: of each sequence its page numbers
        in order. They are read again as it grows: they may be appended to, and are not changed otherwise."""
        self.kv_lens = list(kv_lens)
        self._pages = pages
        self._page_size = page_size
        self._device = device
        self._query_lens = (1,) * len(self.kv_lens)
        self._steps = 0
        self._crossing: list[list[int]] = [[] for _ in range(page_size)]  # rows by the step that opens their next page
        for row, length in enumerate(self.kv_lens):
            self._crossing[-(length - 1) % page_size].append(row)
        self._lay_out()

    def _lay_out(self) -> None:
        """A buffer with room for the pages that the longest sequence has now."""
        size, count = self._page_size, len(self.kv_lens)
        needed = [-(-length // size) for length in self.kv_lens]
        self._width = max(needed)
        self._buffer = np.zeros((4 + self._width) * count + 1, dtype=np.int32)
        self._slots = self._buffer[: 2 * count].view(np.int64)
        self._buffer[2 * count : 3 * count + 1] = np.arange(count + 1)
        self._lengths = self._buffer[3 * count + 1 : 4 * count + 1]
        self._lengths[:] = self.kv_lens
        self._tables = self._buffer[4 * count + 1 :].reshape(count, self._width)
        for row, (held, pages) in enumerate(zip(needed, self._pages, strict=True)):
            self._tables[row, :held] = pages[:held]
            self._slots[row] = pages[held - 1] * size + (self.kv_lens[row] - 1) % size
        self._views = self._split(torch.from_numpy(self._buffer))

    def _split(self, buffer: Tensor) -> _Views:
        count = len(self.kv_lens)
        slots, starts, lengths, tables = torch.split(buffer, [2 * count, count + 1, count, self._width * count])
        return slots.view(torch.int64), starts, lengths, tables.view(count, self._width)

    def advance(self) -> None:
        """One token more for each sequence. What a CPU's last batch was made of changes with it."""
        self.kv_lens = [length + 1 for length in self.kv_lens]
        self._slots += 1
        self._lengths += 1
        self._steps += 1
        for row in self._crossing[self._steps % self._page_size]:
            index = (self.kv_lens[row] - 1) // self._page_size
            if index == self._width:
                self._lay_out()
                return
            page = self._pages[row][index]
            self._tables[row, index] = page
            self._slots[row] = page * self._page_size

    def batch(self) -> AttentionBatch:
        """Of the step that it stands at; its host_tables, and on a CPU all of it, until the next one. One upload; no
        synchronisation."""
        views = self._views
        if self._device.type != "cpu":
            host = torch.from_numpy(self._buffer)
            host = host.pin_memory() if self._device.type == "cuda" else host
            views = self._split(host.to(self._device, non_blocking=True))
        slots, starts, lengths, tables = views
        return AttentionBatch(
            query_lens=self._query_lens,
            kv_lens=tuple(self.kv_lens),
            page_size=self._page_size,
            slots=slots,
            block_tables=tables,
            query_starts=starts,
            kv_lens_device=lengths,
            host_tables=self._tables,
        )
