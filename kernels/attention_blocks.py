"""Paged attention whose bits depend on nothing but the sequence itself: not on its batch mates, not on its chunks.

Queries are taken in blocks of BLOCK positions that begin at multiples of BLOCK, each over the keys up to the block's
end. Every shape then follows from the position alone; queries and keys that are not there yet are zeros, and a masked
key adds exactly nothing. Sequence by sequence, block by block: slow, on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.kernels.attention import AttentionBatch, AttentionOptions, PageCache, check_shapes

BLOCK = 16


@dataclass(frozen=True, slots=True)
class _Block:
    """Some queries of one sequence. rows: where they lie in the packed step; position: of the first of them; start: of
    the block; kv_len: tokens whose keys are there."""

    sequence: int
    rows: slice
    position: int
    start: int
    kv_len: int


class BlockAttention:
    """Computes in float32, or in float64 where q is float64."""

    name = "blocks"
    is_capturable = False

    def warm_up(self, num_heads: int, cache: PageCache, options: AttentionOptions) -> None:
        """Nothing is compiled."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
    ) -> Tensor:
        check_shapes(q, k, v, cache, batch, options)
        cache.write(batch.slots, k, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for block in batch.once("blocks", lambda: tuple(_blocks(batch))):
            out[block.rows] = _attend(q, cache, batch, block, options)
        return out


def _blocks(batch: AttentionBatch) -> Iterator[_Block]:
    row = 0
    for sequence, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        position = kv_len - query_len
        while position < kv_len:
            start = position // BLOCK * BLOCK
            stop = min(start + BLOCK, kv_len)
            yield _Block(sequence, slice(row, row + stop - position), position, start, kv_len)
            row += stop - position
            position = stop


def _attend(q: Tensor, cache: PageCache, batch: AttentionBatch, block: _Block, options: AttentionOptions) -> Tensor:
    """[rows of the block, H, D]"""
    dtype, heads = torch.promote_types(q.dtype, torch.float32), cache.num_kv_heads
    at = slice(block.position - block.start, block.position - block.start + block.rows.stop - block.rows.start)
    queries = torch.zeros((BLOCK, *q.shape[1:]), dtype=dtype, device=q.device)
    queries[at] = q[block.rows].to(dtype)
    first = 0 if options.window is None else max(0, block.start + 1 - options.window)
    keys, values = (_slots(cache, half, batch, block, first, dtype) for half in (0, 1))  # [KV, S, D]
    folded = queries.view(BLOCK, heads, -1, q.shape[2]).permute(1, 2, 0, 3).flatten(1, 2)  # [KV, G * BLOCK, D]
    logits = torch.bmm(folded, keys.transpose(1, 2)).view(q.shape[1], BLOCK, -1) * options.scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    weights = _softmax(logits.masked_fill(_hidden(block, first, options.window, q.device), -torch.inf), options.sinks)
    out = torch.bmm(weights.view(heads, -1, keys.shape[1]), values).view(q.shape[1], BLOCK, -1)
    return out[:, at].transpose(0, 1).to(q.dtype)


def _slots(cache: PageCache, half: int, batch: AttentionBatch, block: _Block, first: int, dtype: torch.dtype) -> Tensor:
    """K or V of the positions from ``first`` to the block's end, zeros where there is none yet: [KV, S, D]."""
    stop = min(block.kv_len, block.start + BLOCK)
    low = first // batch.page_size
    table = batch.block_tables[block.sequence, low : -(-stop // batch.page_size)].long()
    found = cache.read(half, table).flatten(0, 1)[first - low * batch.page_size : stop - low * batch.page_size]
    shape = (cache.num_kv_heads, block.start + BLOCK - first, cache.head_dim)
    slots = torch.zeros(shape, dtype=dtype, device=found.device)
    slots[:, : len(found)] = found.transpose(0, 1).to(dtype)
    return slots


def _hidden(block: _Block, first: int, window: int | None, device: torch.device) -> Tensor:
    """bool [BLOCK, S]"""
    query = torch.arange(block.start, block.start + BLOCK, device=device)[:, None]
    key = torch.arange(first, block.start + BLOCK, device=device)
    hidden = key > query
    return hidden if window is None else hidden | (query - key >= window)


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """[H, BLOCK, S]; a sink takes its share of the sum."""
    if sinks is None:
        return torch.softmax(logits, dim=-1)
    column = sinks.to(logits.dtype)[:, None, None].expand(-1, BLOCK, 1)
    return torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)[..., :-1].contiguous()
