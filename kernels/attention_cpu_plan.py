"""How the CPU body cuts one step into matmuls: groups of sequences, gathers of their pages, tiles of their queries.

Made once per batch (and window) and shared by all layers. Three kinds of group:
- decode: sequences with one new token, bucketed by length so that a long one does not pad many short ones;
- fresh: sequences without cached tokens and of one length, which attend over the step's own K and V without a gather;
- context: one sequence with several new tokens after cached ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.kernels.attention import AttentionBatch, PageCache

GROUP_OVERHEAD_BYTES = 1 << 20  # a group of its own costs about as much as gathering this much padding
GATHER_LIMIT_BYTES = 16 << 20  # of K and V in one group: beyond this the copy leaves the last-level cache
TILE_ROWS = 384  # query rows of one kv head in a tile
KEPT_MASK_ITEMS = 8 << 20  # a sequence's masks beyond this are made anew by each layer


@dataclass(frozen=True, slots=True, eq=False)
class Gather:
    """Which pages to copy and which copied slots hold no token of the sequence.

    pages: int64 [2 * num_seqs * kv_heads * pages] rows of the cache's memory seen as [n, page * dim].
    dead: int64, rows of the copy seen as [2 * num_seqs * kv_heads * slots, dim]; zeroed, because 0 * NaN is NaN.
    """

    pages: Tensor
    dead: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Queries ``rows`` of each sequence against its gathered slots ``columns``.

    queries: absolute positions, int64 [num_seqs or 1, rows, 1]; keys: [num_seqs or 1, 1, columns].
    keep: whether the mask is small enough to stay in memory for the other layers.
    """

    rows: slice
    columns: slice
    queries: Tensor
    keys: Tensor
    window: int | None
    keep: bool

    def mask(self, dtype: torch.dtype) -> Tensor:
        """0 or -inf, [num_seqs or 1, rows, columns]."""
        hidden = self.keys > self.queries
        if self.window is not None:
            hidden |= self.queries - self.keys >= self.window
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Sequences that go through one matmul. tokens: their rows in the packed step, sequence by sequence."""

    num_seqs: int
    query_len: int
    tokens: slice | Tensor
    gather: Gather | None
    tiles: tuple[Tile, ...]


class Steps(NamedTuple):
    """From a head's page to others in memory, in head's pages: to the same one of the next page, and from K to V."""

    page: int
    half: int

    @classmethod
    def of(cls, cache: PageCache) -> Steps:
        half, page = cache.data.stride()[:2]
        return cls(page // cache.head_items, half // cache.head_items)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a plan depends on besides the batch."""

    steps: Steps
    num_kv_heads: int
    token_bytes: int  # K and V of one token
    group_heads: int
    window: int | None

    @classmethod
    def of(cls, cache: PageCache, num_heads: int, window: int | None) -> Layout:
        heads = cache.num_kv_heads
        token_bytes = 2 * heads * cache.head_dim * cache.dtype.itemsize
        return cls(Steps.of(cache), heads, token_bytes, num_heads // heads, window)


def plan(batch: AttentionBatch, layout: Layout, sequences: Iterable[int]) -> tuple[Group, ...]:
    """Every packed token of these sequences is in exactly one group."""
    decode: list[int] = []
    more: list[int] = []
    for i in sequences:
        (decode if batch.query_lens[i] == 1 else more).append(i)
    fresh: dict[int, list[int]] = {}
    for i in more:
        if batch.query_lens[i] == batch.kv_lens[i]:
            fresh.setdefault(batch.query_lens[i], []).append(i)
    context = [i for i in more if batch.query_lens[i] < batch.kv_lens[i]]
    groups = [_decode_group(batch, layout, rows) for rows in _buckets(batch, layout, decode)]
    groups += [_fresh_group(batch, layout, rows) for rows in fresh.values()]
    groups += [_context_group(batch, layout, i) for i in context]
    return tuple(groups)


def _buckets(batch: AttentionBatch, layout: Layout, decode: Sequence[int]) -> Iterator[list[int]]:
    """Longest first; a bucket closes when its padding would cost more than another group, or it grows too large."""
    bucket: list[int] = []
    waste = longest = 0
    spans = {i: min(batch.kv_lens[i], layout.window or batch.kv_lens[i]) * layout.token_bytes for i in decode}
    for i in sorted(decode, key=spans.__getitem__, reverse=True):
        waste += longest - spans[i]
        if bucket and (waste > GROUP_OVERHEAD_BYTES or longest * (len(bucket) + 1) > GATHER_LIMIT_BYTES):
            yield sorted(bucket)
            bucket = []
        if not bucket:
            waste, longest = 0, spans[i]
        bucket.append(i)
    if bucket:
        yield sorted(bucket)


def _decode_group(batch: AttentionBatch, layout: Layout, rows: list[int]) -> Group:
    lengths = np.asarray([batch.kv_lens[i] for i in rows])
    first = np.maximum(lengths - layout.window, 0) // batch.page_size if layout.window else np.zeros_like(lengths)
    gather, num_slots = _gather(batch, layout, rows, lengths, first)
    tile = _tile(lengths[:, None] - 1, first[:, None] * batch.page_size + np.arange(num_slots), 0, 0, layout)
    return Group(len(rows), 1, _tokens(batch, rows), gather, (tile,))


def _fresh_group(batch: AttentionBatch, layout: Layout, rows: list[int]) -> Group:
    length = batch.query_lens[rows[0]]
    return Group(len(rows), length, _tokens(batch, rows), None, _tiles(length, length, 0, layout))


def _context_group(batch: AttentionBatch, layout: Layout, row: int) -> Group:
    query_len, kv_len = batch.query_lens[row], batch.kv_lens[row]
    first = max(0, kv_len - query_len + 1 - layout.window) // batch.page_size if layout.window else 0
    gather, _ = _gather(batch, layout, [row], np.asarray([kv_len]), np.asarray([first]))
    tiles = _tiles(query_len, kv_len, first * batch.page_size, layout)
    return Group(1, query_len, _tokens(batch, [row]), gather, tiles)


def _tiles(query_len: int, kv_len: int, first: int, layout: Layout) -> tuple[Tile, ...]:
    """Tiles over the queries, each with only the keys that some query of it sees. first: position of slot 0."""
    step = max(32, TILE_ROWS // layout.group_heads)
    tiles = []
    for start in range(0, query_len, step):
        queries = np.arange(start, min(query_len, start + step)) + kv_len - query_len
        lowest = max(first, int(queries[0]) + 1 - layout.window) if layout.window else first
        keys = np.arange(lowest, int(queries[-1]) + 1)
        keep = query_len * kv_len <= KEPT_MASK_ITEMS
        tiles.append(_tile(queries[None], keys[None], start, lowest - first, layout, keep))
    return tuple(tiles)


def _tile(
    queries: NDArray[np.int64], keys: NDArray[np.int64], row: int, column: int, layout: Layout, keep: bool = True
) -> Tile:
    """queries: [num_seqs or 1, rows], keys: [num_seqs or 1, columns]; row, column: where the tile begins."""
    rows, columns = slice(row, row + queries.shape[1]), slice(column, column + keys.shape[1])
    positions = torch.from_numpy(queries[:, :, None]), torch.from_numpy(keys[:, None, :])
    return Tile(rows, columns, *positions, layout.window, keep)


def _gather(
    batch: AttentionBatch, layout: Layout, rows: list[int], lengths: NDArray[np.int64], first: NDArray[np.int64]
) -> tuple[Gather, int]:
    """The pages from ``first`` on of each row, padded to the longest with the row's own first page; and its slots."""
    counts = -(-lengths // batch.page_size) - first
    column = np.arange(counts.max())
    page = first[:, None] + np.where(column < counts[:, None], column, 0)  # [rows, columns] index into the page table
    numbers = batch.host_tables[np.asarray(rows)[:, None], page].astype(np.int64)
    halves = np.arange(2)[:, None, None, None] * layout.steps.half + numbers[:, None] * layout.steps.page
    pages = halves + np.arange(layout.num_kv_heads)[:, None]  # [2, rows, kv_heads, columns]
    position = page[:, :, None] * batch.page_size + np.arange(batch.page_size)
    dead = _dead(position.reshape(len(rows), -1) >= lengths[:, None], layout.num_kv_heads)
    return Gather(torch.from_numpy(pages.reshape(-1)), dead), len(column) * batch.page_size


def _dead(empty: NDArray[np.bool_], num_kv_heads: int) -> Tensor:
    """empty: [rows, slots] -> rows of the flat copy, for K and V and every head."""
    num_rows, num_slots = empty.shape
    row, slot = np.nonzero(empty)
    block = (np.arange(2)[:, None] * num_rows + row) * num_kv_heads  # [2, n]
    flat = (block[:, None] + np.arange(num_kv_heads)[:, None]) * num_slots + slot
    return torch.from_numpy(flat.reshape(-1))


def _tokens(batch: AttentionBatch, rows: list[int]) -> slice | Tensor:
    """Packed rows of equally long sequences: a slice where they lie side by side."""
    query_len = batch.query_lens[rows[0]]
    starts = np.concatenate([[0], np.cumsum(batch.query_lens)])[rows]
    if rows[-1] - rows[0] + 1 == len(rows) and starts[-1] - starts[0] == query_len * (len(rows) - 1):
        return slice(int(starts[0]), int(starts[-1]) + query_len)
    return torch.from_numpy((starts[:, None] + np.arange(query_len)).reshape(-1))
