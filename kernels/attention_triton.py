# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, no-check-untyped-defs
"""Paged attention in Triton: one kernel for prompts and decoding, and a reduction over splits of long contexts.

A program takes the queries of one tile (sequence, first query) that share one kv head: tokens times group heads are
its rows, so K and V are read once per kv head. The softmax is FlashAttention's online one, in float32 and base 2.
Few rows over long contexts leave most of the device idle: their keys are split over programs, whose partial sums a
second kernel adds up (Flash-Decoding). Grids come from lengths known on the host; nothing waits for the device.
Triton compiles anew for each class of an argument (one, a multiple of 16): what changes with the batch is exempt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from onebase.kernels import kv_fp8
from onebase.kernels.attention import AttentionBatch, AttentionOptions, PageCache, check_shapes
from onebase.kernels.attention_triton_fp8 import decode, write_fp8

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SPLITS = 64
INTERPRETER_PROCESSORS = 4
BATCH_VIEWS = ["tables", "query_starts", "kv_lens"]  # cut from one upload: their alignment changes with the batch


@triton.jit
def _write(
    k, v, k_pages, v_pages, slots, k_t, k_h, k_d, v_t, v_h, v_d, page_stride, slot_stride, head_stride, dim_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program t copies token t's K and V into its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    item = tl.arange(0, BLOCK)
    head, dim = item // DIM, item % DIM
    live = item < HEADS * DIM
    place = slot // PAGE * page_stride + slot % PAGE * slot_stride + head * head_stride + dim * dim_stride
    tl.store(k_pages + place, tl.load(k + token * k_t + head * k_h + dim * k_d, mask=live), mask=live)
    tl.store(v_pages + place, tl.load(v + token * v_t + head * v_h + dim * v_d, mask=live), mask=live)


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    """fp32 accumulation. WIDE: products in fp32 too, for the interpreter, which cannot multiply bf16."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _finish(
    acc, top, total, out, sinks, row, head, dim, live, out_t, out_h,
    DIM: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Adds the sinks to the denominator, divides, stores. acc: [M, D]; top (base 2), total: [M]."""
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2E
        above = tl.maximum(top, sink)
        shrink = tl.exp2(top - above)
        total = total * shrink + tl.exp2(sink - above)
        acc = acc * shrink[:, None]
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    place = row.to(tl.int64)[:, None] * out_t + head[:, None] * out_h + dim[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=live[:, None] & (dim[None, :] < DIM))


@triton.jit
def _rows(tiles, query_starts, tile, kv_head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile's rows: sequence, its start and length, first query, and per row its query, head and liveness."""
    sequence = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    start = tl.load(query_starts + sequence)
    query_len = tl.load(query_starts + sequence + 1) - start
    item = tl.arange(0, BLOCK_M)
    query = first + item // GROUP
    live = (item < BLOCK_M // GROUP * GROUP) & (query < query_len)
    return sequence, start, query_len, first, query, kv_head * GROUP + item % GROUP, live


@triton.jit
def _store_partial(acc, top, total, partial, stats, dim, DIM: tl.constexpr, BLOCK_M: tl.constexpr):
    """partial: [tiles, kv_heads, splits, M, DIM]; stats: [2, tiles, kv_heads, splits, M], the maxima and the totals."""
    block = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    item = (block * tl.num_programs(2) + tl.program_id(2)) * BLOCK_M + tl.arange(0, BLOCK_M)
    items = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * tl.num_programs(2) * BLOCK_M
    tl.store(stats + item, top)
    tl.store(stats + items + item, total)
    tl.store(partial + item[:, None] * DIM + dim[None, :], acc, mask=dim[None, :] < DIM)


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=BATCH_VIEWS)
def _attend(
    q, k_pages, v_pages, k_exponents, v_exponents, out, partial, stats, tables, query_starts, kv_lens, tiles, sinks,
    q_t, q_h, q_d, page_stride, slot_stride, head_stride, dim_stride, out_t, out_h, table_stride,
    scale, softcap, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, SPLIT: tl.constexpr,
    FP8: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (tile, kv head, split) attends its rows over its share of the keys."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, start, query_len, first, query, head, live = _rows(tiles, query_starts, tile, kv_head, GROUP, BLOCK_M)
    kv_len = tl.load(kv_lens + sequence)
    position = kv_len - query_len + query  # [M]
    dim = tl.arange(0, BLOCK_D)
    place = (start + query).to(tl.int64)[:, None] * q_t + head[:, None] * q_h + dim[None, :] * q_d
    queries = tl.load(q + place, mask=live[:, None] & (dim[None, :] < DIM), other=0.0)  # [M, D]

    low = 0
    high = kv_len - query_len + tl.minimum(first + BLOCK_M // GROUP, query_len)
    if HAS_WINDOW:
        low = tl.maximum(kv_len - query_len + first - window + 1, 0) // BLOCK_N * BLOCK_N
    if SPLIT:
        share = tl.cdiv(tl.cdiv(high - low, BLOCK_N), tl.num_programs(2)) * BLOCK_N
        low += split * share
        high = tl.minimum(high, low + share)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = tables + sequence.to(tl.int64) * table_stride
    for begin in range(low, high, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        known = key < high
        page = tl.load(table + key // PAGE, mask=known, other=0).to(tl.int64)
        page = page * page_stride + kv_head.to(tl.int64) * head_stride
        where = (page + key % PAGE * slot_stride)[:, None] + dim[None, :] * dim_stride  # [N, D]
        loaded = known[:, None] & (dim[None, :] < DIM)
        keys = tl.load(k_pages + where, mask=loaded, other=0.0)
        if FP8:
            keys = decode(keys, k_exponents + page + key % PAGE, known, queries.dtype)
        logits = _dot(queries, tl.trans(keys), WIDE) * scale  # [M, N]
        if HAS_SOFTCAP:
            logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)  # tanh
        visible = known[None, :] & (key[None, :] <= position[:, None])
        if HAS_WINDOW:
            visible = visible & (position[:, None] - key[None, :] < window)
        logits = tl.where(visible, logits * LOG2E, float("-inf"))
        above = tl.maximum(top, tl.max(logits, 1))
        origin = tl.where(above == float("-inf"), 0.0, above)  # a row may see no key of this block
        weights = tl.exp2(logits - origin[:, None])
        shrink = tl.exp2(top - origin)
        values = tl.load(v_pages + where, mask=loaded, other=0.0)
        if FP8:
            values = decode(values, v_exponents + page + key % PAGE, known, queries.dtype)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + _dot(weights.to(values.dtype), values, WIDE)
        top = above

    if SPLIT:
        _store_partial(acc, top, total, partial, stats, dim, DIM, BLOCK_M)
    else:
        _finish(acc, top, total, out, sinks, start + query, head, dim, live, out_t, out_h, DIM, HAS_SINKS)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["query_starts"])
def _reduce(
    partial, stats, out, query_starts, tiles, sinks, out_t, out_h, splits,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Program (tile, kv head) adds up the splits of its rows."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    _, start, _, _, query, head, live = _rows(tiles, query_starts, tile, kv_head, GROUP, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    first = (tile.to(tl.int64) * tl.num_programs(1) + kv_head) * splits
    blocks = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * splits
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(splits):
        item = (first + split) * BLOCK_M + tl.arange(0, BLOCK_M)
        its_top = tl.load(stats + item)
        above = tl.maximum(top, its_top)
        origin = tl.where(above == float("-inf"), 0.0, above)  # a split may be empty
        shrink, grow = tl.exp2(top - origin), tl.exp2(its_top - origin)
        total = total * shrink + tl.load(stats + blocks * BLOCK_M + item) * grow
        part = tl.load(partial + item[:, None] * DIM + dim[None, :], mask=dim[None, :] < DIM, other=0.0)
        acc = acc * shrink[:, None] + part * grow[:, None]
        top = above
    _finish(acc, top, total, out, sinks, start + query, head, dim, live, out_t, out_h, DIM, HAS_SINKS)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Tile sizes for one head_dim and dtype, within 96 KiB of shared memory with K and V double-buffered."""

    m: int
    n: int
    d: int
    warps: int
    stages: int

    @classmethod
    def of(cls, group: int, dim: int, itemsize: int, decode: bool) -> _Blocks:
        d = max(16, triton.next_power_of_2(dim))
        rows, n, stages = {True: (64, 64, 2), False: (32, 32, 1)}[d * itemsize <= 256]
        if d * itemsize > 512:
            rows, n = 32, 16
        m = max(16 if decode else rows, triton.next_power_of_2(group))
        return cls(m, n, d, 4, stages)


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """Tiles of one step that run together. tiles: int32 [num_tiles, 2] of (sequence, first query), longest first."""

    tiles: Tensor
    blocks: _Blocks
    splits: int


@dataclass(frozen=True, slots=True)
class TritonAttention:
    """processors: programs the device runs at once. split_tokens: keys below which a split does not pay."""

    processors: int
    split_tokens: int = 256
    name: str = "triton"
    is_capturable: bool = True

    @classmethod
    def on(cls, device: torch.device) -> TritonAttention:
        if device.type == "cuda":
            return cls(torch.cuda.get_device_properties(device).multi_processor_count)
        if isinstance(_attend, JITFunction):
            raise ValueError(f"attention 'triton' on {device.type}: allowed with TRITON_INTERPRET=1 in the environment")
        return cls(INTERPRETER_PROCESSORS)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
    ) -> Tensor:
        check_shapes(q, k, v, cache, batch, options)
        if q.dtype not in DTYPES:
            raise ValueError(f"q is {q.dtype}: allowed is {', '.join(map(str, DTYPES))}")
        write_pages(k, v, cache, batch)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.attend(q, out, cache, batch, options, range(batch.num_seqs))
        return out

    def attend(
        self,
        q: Tensor,
        out: Tensor,
        cache: PageCache,
        batch: AttentionBatch,
        options: AttentionOptions,
        sequences: Sequence[int],
    ) -> None:
        """Write the rows of these sequences into out [T, heads, head_dim]; their K and V are in the pages."""
        group = q.shape[1] // cache.num_kv_heads
        key = ("triton", group, cache.head_dim, q.dtype, options.window, tuple(sequences))
        for launch in batch.once(key, lambda: self._launches(batch, cache, group, options.window, sequences)):
            _run_attend(q, out, cache, batch, options, launch)

    def warm_up(self, num_heads: int, cache: PageCache, options: AttentionOptions) -> None:
        """A prompt, a decoding row, and one whose keys are split."""
        device, dtype, size = cache.data.device, cache.dtype, cache.page_size
        own = cache.single()
        for queries, length in ((2, 2), (1, 1), (1, 2 * self.split_tokens)):
            batch = AttentionBatch.build([queries], [length], [[0] * -(-length // size)], size, device)
            q = torch.zeros(queries, num_heads, cache.head_dim, dtype=dtype, device=device)
            kv = q[:, : cache.num_kv_heads].contiguous()
            self(q, kv, kv, own, batch, options)

    def _launches(
        self, batch: AttentionBatch, cache: PageCache, group: int, window: int | None, sequences: Sequence[int]
    ) -> list[_Launch]:
        """Decoding rows in small tiles, split where they are few; all others in large tiles."""
        launches = []
        lens, wanted = np.asarray(batch.query_lens), np.asarray(sequences, dtype=np.int64)
        for rows in (wanted[lens[wanted] == 1], wanted[lens[wanted] > 1]):
            if len(rows):
                decode = bool(lens[rows[0]] == 1)
                blocks = _Blocks.of(group, cache.head_dim, cache.dtype.itemsize, decode)
                tiles = _tiles(batch, rows, blocks.m // group)
                longest = max(batch.kv_lens[i] for i in rows)
                keys = min(longest, window) if window else longest
                splits = self._splits(len(tiles) * cache.num_kv_heads, keys) if decode else 1
                launches.append(_Launch(_upload(tiles, batch.slots.device), blocks, splits))
        return launches

    def _splits(self, programs: int, keys: int) -> int:
        """Enough to give each processor two programs, none shorter than split_tokens."""
        return max(1, min(-(-2 * self.processors // programs), keys // self.split_tokens, MAX_SPLITS))


def _tiles(batch: AttentionBatch, rows: np.ndarray, tokens: int) -> np.ndarray:
    lens, ends = np.asarray(batch.query_lens)[rows], np.asarray(batch.kv_lens)[rows]
    counts = -(-lens // tokens)
    first = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens
    tiles = np.stack([np.repeat(rows, counts), first], axis=1).astype(np.int32)
    return tiles[np.argsort(-(np.repeat(ends - lens, counts) + first), kind="stable")]


def _upload(tiles: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(tiles)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def write_pages(k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch) -> None:
    """Put k and v [T, kv_heads, head_dim] where the batch says."""
    heads, dim = cache.num_kv_heads, cache.head_dim
    if cache.exponents is not None:
        write_fp8[batch.num_tokens, heads](
            k, v, *_stored(cache), batch.slots, *k.stride(), *v.stride(), *cache.k.stride()[:3],
            DIM=dim, PAGE=cache.page_size, BLOCK=triton.next_power_of_2(dim),
        )  # fmt: skip
        return
    _write[(batch.num_tokens,)](
        k, v, cache.k, cache.v, batch.slots, *k.stride(), *v.stride(), *cache.k.stride(),
        HEADS=heads, DIM=dim, PAGE=cache.page_size, BLOCK=triton.next_power_of_2(heads * dim),
    )  # fmt: skip


def _stored(cache: PageCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of K and V, and their exponents; without fp8 K and V, and nothing that is read."""
    if cache.exponents is None:
        return cache.k, cache.v, cache.k, cache.v
    return cache.k.view(kv_fp8.CODE), cache.v.view(kv_fp8.CODE), cache.exponents[0], cache.exponents[1]


def _run_attend(
    q: Tensor, out: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions, launch: _Launch
) -> None:
    blocks, heads, dim = launch.blocks, cache.num_kv_heads, cache.head_dim
    programs = (len(launch.tiles), heads, launch.splits)
    size = math.prod(programs) * blocks.m if launch.splits > 1 else 0
    partial = torch.empty(size * dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(2 * size, dtype=torch.float32, device=q.device)
    sinks = options.sinks.contiguous() if options.sinks is not None else q
    shape = {"GROUP": q.shape[1] // heads, "DIM": dim, "BLOCK_M": blocks.m, "BLOCK_D": blocks.d}
    shape["HAS_SINKS"] = options.sinks is not None
    _attend[programs](
        q, *_stored(cache), out, partial, stats,
        batch.block_tables, batch.query_starts, batch.kv_lens_device, launch.tiles, sinks,
        *q.stride(), *cache.k.stride(), out.stride(0), out.stride(1), batch.block_tables.stride(0),
        options.scale, options.softcap or 0.0, options.window or 0,
        **shape, PAGE=cache.page_size, BLOCK_N=blocks.n, HAS_WINDOW=options.window is not None,
        HAS_SOFTCAP=options.softcap is not None,
        SPLIT=launch.splits > 1, FP8=cache.fp8, WIDE=not isinstance(_attend, JITFunction),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if launch.splits > 1:
        _reduce[programs[:2]](
            partial, stats, out, batch.query_starts, launch.tiles, sinks, out.stride(0), out.stride(1),
            launch.splits, **shape, num_warps=blocks.warps,
        )  # fmt: skip
