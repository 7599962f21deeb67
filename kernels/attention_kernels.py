# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, no-check-untyped-defs
"""The Triton kernels of paged attention: one for prompts and decoding, and a reduction over splits of long contexts.

A program takes the queries of one tile (sequence, first query) that share one kv head: tokens times group heads are
its rows, so K and V are read once per kv head. The softmax is FlashAttention's online one, in float32 and base 2.
Triton compiles anew for each class of an argument (one, a multiple of 16): what changes with the batch is exempt.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from onebase.kernels.attention_kernels_fp8 import decode

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
BATCH_VIEWS = ["tables", "query_starts", "kv_lens"]  # cut from one upload: their alignment changes with the batch


@triton.jit
def write_kernel(
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
def _store_partial(acc, top, total, partial, stats, dim, live, DIM: tl.constexpr, BLOCK_M: tl.constexpr):
    """partial: [tiles, kv_heads, splits, M, DIM]; stats: [2, tiles, kv_heads, splits, M], the maxima and the totals.

    Partial sums of rows without keys in this split, and of no query, are not stored; reduce_kernel reads none.
    """
    block = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    item = (block * tl.num_programs(2) + tl.program_id(2)) * BLOCK_M + tl.arange(0, BLOCK_M)
    items = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * tl.num_programs(2) * BLOCK_M
    tl.store(stats + item, top)
    tl.store(stats + items + item, total)
    written = (live & (top > float("-inf")))[:, None]
    tl.store(partial + item[:, None] * DIM + dim[None, :], acc, mask=written & (dim[None, :] < DIM))


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=BATCH_VIEWS)
def attend_kernel(
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
        _store_partial(acc, top, total, partial, stats, dim, live, DIM, BLOCK_M)
    else:
        _finish(acc, top, total, out, sinks, start + query, head, dim, live, out_t, out_h, DIM, HAS_SINKS)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["query_starts"])
def reduce_kernel(
    partial, stats, out, query_starts, tiles, sinks, out_t, out_h, splits,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (tile, kv head, head of its group) adds up a decoding row's splits, BLOCK_S of them at once."""
    tile, kv_head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(query_starts + tl.load(tiles + 2 * tile))
    dim = tl.arange(0, BLOCK_D)
    first = (tile.to(tl.int64) * tl.num_programs(1) + kv_head) * splits
    totals = stats + tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * splits * BLOCK_M
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    for begin in range(0, splits, BLOCK_S):
        split = begin + tl.arange(0, BLOCK_S)
        place = (first + split) * BLOCK_M + item
        tops = tl.load(stats + place, mask=split < splits, other=float("-inf"))  # [S]
        seen = tops > float("-inf")  # a split may be empty: it has no partial sums
        parts = seen[:, None] & (dim[None, :] < DIM)
        part = tl.load(partial + place[:, None] * DIM + dim[None, :], mask=parts, other=0.0)  # [S, D]
        above = tl.maximum(top, tl.max(tops, 0))
        origin = tl.where(above == float("-inf"), 0.0, above)
        shrink, grow = tl.exp2(top - origin), tl.exp2(tops - origin)
        total = total * shrink + tl.sum(tl.load(totals + place, mask=seen, other=0.0) * grow, 0)
        acc = acc * shrink[:, None] + tl.sum(part * grow[:, None], 0)[None, :]
        top = above
    one = tl.zeros([1], tl.int32)
    head = kv_head * GROUP + item + one
    _finish(acc, top, total, out, sinks, start + one, head, dim, one == 0, out_t, out_h, DIM, HAS_SINKS)
