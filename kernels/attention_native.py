"""Paged attention on the CPU in C for sequences with one new token, or a few: pages are read where they lie.

Prompts go the way of attention_cpu.py, whose products over many queries are faster. That body is the plain twin too.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onebase.kernels.attention import AttentionBatch, AttentionOptions, PageCache, check_shapes
from onebase.kernels.attention_cpu import CpuAttention, attend_groups
from onebase.kernels.attention_cpu_plan import Layout, plan
from onebase.kernels.native.library import Native, Pages, Queries, native

FEW = 8  # new tokens of a sequence that still go this way: each of them reads the keys by itself
MOST_DIM = 256


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A step's sequences with few new tokens, token by token, and the others.

    rows: int64, packed tokens; sequences, positions: int32, of each of them. others: numbers of sequences.
    """

    rows: Tensor
    sequences: Tensor
    positions: Tensor
    others: tuple[int, ...]

    @classmethod
    def of(cls, batch: AttentionBatch) -> Split:
        new, kept = np.asarray(batch.query_lens), np.asarray(batch.kv_lens)
        sequence = np.repeat(np.arange(len(new)), new)
        row = np.arange(len(sequence))
        position = row + (kept - np.cumsum(new))[sequence]
        few = (new <= FEW)[sequence]
        sequences, positions = (torch.from_numpy(of[few].astype(np.int32)) for of in (sequence, position))
        return cls(torch.from_numpy(row[few]), sequences, positions, tuple(np.flatnonzero(new > FEW).tolist()))


class NativeAttention:
    """Computes in float32. The cache must have heads before tokens, as on the CPU. What the library does not
    have goes to the plain body: other types, head sizes that are no multiple of 16, pages in fp8."""

    name = "native"
    is_capturable = False

    def __init__(self) -> None:
        self._plain = CpuAttention()

    def warm_up(self, num_heads: int, cache: PageCache, options: AttentionOptions) -> None:
        """The library is compiled before there is such a body."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
    ) -> Tensor:
        functions = native(q.dtype) if _fits(cache) else None
        if functions is None:
            return self._plain(q, k, v, cache, batch, options)
        check_shapes(q, k, v, cache, batch, options)
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        pages, split = _pages(cache), batch.once("native", lambda: Split.of(batch))
        _write(functions, k, v, pages, batch)
        out = torch.empty(q.shape, dtype=q.dtype)
        if len(split.rows):
            _attend(functions, q, pages, batch, split, options, out)
        if split.others:
            layout = Layout.of(cache, q.shape[1], options.window)
            groups = batch.once(("native", layout), lambda: plan(batch, layout, split.others))
            attend_groups(q, k, v, cache, batch, groups, options, out)
        return out


def _fits(cache: PageCache) -> bool:
    return not cache.fp8 and cache.head_dim % 16 == 0 and cache.head_dim <= MOST_DIM


def _pages(cache: PageCache) -> Pages:
    half, page, _, head, _ = cache.data.stride()
    return Pages(cache.data.data_ptr(), page, head, half, cache.page_size, cache.num_kv_heads, cache.head_dim)


def _write(functions: Native, k: Tensor, v: Tensor, pages: Pages, batch: AttentionBatch) -> None:
    keys, values = (k.data_ptr(), *k.stride()[:2]), (v.data_ptr(), *v.stride()[:2])
    functions.write_pages(byref(pages), *keys, *values, batch.slots.data_ptr(), batch.num_tokens)


def _attend(
    functions: Native,
    q: Tensor,
    pages: Pages,
    batch: AttentionBatch,
    split: Split,
    options: AttentionOptions,
    out: Tensor,
) -> None:
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    queries = Queries(
        q.data_ptr(),
        *q.stride()[:2],
        q.shape[1] // pages.heads,
        split.rows.data_ptr(),
        split.sequences.data_ptr(),
        split.positions.data_ptr(),
        len(split.rows),
        batch.block_tables.data_ptr(),
        batch.block_tables.shape[1],
        options.scale,
        options.softcap or 0.0,
        options.window or 0,
        None if sinks is None else sinks.data_ptr(),
    )
    functions.attend(byref(pages), byref(queries), out.data_ptr())
