"""Shrink and expand for tiles of a few rows: decoding, where most rows have an adapter of their own.

The work is to read the factors once, and tensor cores would have 16 rows to fill. So a program takes one row at a time:
products in fp32 over blocks of a factor. Sums stay within a warp, as those across warps cost more than the reading: a
shrink sums along the rows of a block that has a warp for every few of them, an expand down its columns, with as many
warps as it takes for one to have 256 columns. The tables and xa are those of matmul_kernels.py; a shrink takes parts of
tiles (tiles.py). A tile's later rows find the block in the processor's cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from onebase.kernels.matmul_kernels import mapped, output_of, whole


@triton.jit(do_not_specialize=["packed_rows", "group_size"])
def shrink_rows_kernel(
    x,  # [rows, in_features], row stride x_stride
    arena,
    table,  # [programs, n_sites, FIELDS] int64
    parts,  # [n_parts, TILE_FIELDS] int32
    sites,  # [group] int32
    xa,  # [splits, group, packed_rows, width] fp32
    x_stride,
    in_features,
    n_sites,
    packed_rows,
    width,
    group_size,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGN: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
):
    """Grid: (parts, group * SPLITS). BLOCK_R: RANK_BLOCK, as the parts were cut."""
    tile = parts + tl.program_id(0) * TILE_FIELDS
    count = tl.load(tile + 2)
    if count == 0:
        return
    first_r = tl.load(tile + 5)
    member = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    entry = table + (tl.load(tile + 3).to(tl.int64) * n_sites + tl.load(sites + member)) * FIELDS
    rank = tl.load(entry + 3)
    if first_r >= rank:
        return
    r = first_r + tl.arange(0, BLOCK_R)
    a_rows = arena + tl.multiple_of(tl.load(entry), ALIGN) + r.to(tl.int64)[:, None] * in_features
    plane = (split * group_size + member).to(tl.int64) * packed_rows + tl.load(tile + 1)
    for m in range(count):
        x_row = x + (tl.load(tile) + m).to(tl.int64) * x_stride
        acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        for start in range(split * BLOCK_K, in_features, BLOCK_K * SPLITS):
            k = start + tl.arange(0, BLOCK_K)
            inside = k < in_features
            x_part = tl.load(x_row + k, mask=inside, other=0.0).to(tl.float32)
            a_part = tl.load(a_rows + k[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0)
            acc += a_part.to(tl.float32) * x_part[None, :]
        tl.store(xa + (plane + m) * width + r, tl.sum(acc, 1), mask=r < whole(rank))


@triton.jit(do_not_specialize=["site0", "site1", "site2", "member0", "member1", "member2", "maps"])
def expand_rows_kernel(
    y0,  # three slices, as in expand_kernel
    y1,
    y2,
    arena,
    table,  # [programs, n_sites, FIELDS] int64
    scales,  # the table read as float64
    tiles,  # [n_tiles, TILE_FIELDS] int32, of one layer
    tile_scales,  # the tiles read as float32
    source,  # linear: xa [splits, group, packed_rows, width] fp32; token: the token ids, int64
    stride0,
    stride1,
    stride2,
    n0,
    n1,
    n2,
    site0,
    site1,
    site2,
    member0,
    member1,
    member2,
    n_sites,
    member_stride,
    split_stride,
    width,
    maps,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two
    STAGES: tl.constexpr,  # blocks of B that are on their way at once
    TOKEN: tl.constexpr,
    ALIGN: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
):
    """Grid: (tiles of the layer, column blocks of all slices)."""
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    count = tl.load(tile + 2)
    if count == 0:
        return
    y, y_stride, out_features, site, member, first = output_of(
        tl.program_id(1), y0, y1, y2, stride0, stride1, stride2, n0, n1, n2, site0, site1, site2, member0, member1,
        member2, BLOCK_N,
    )  # fmt: skip
    at = (tl.load(tile + 3).to(tl.int64) * n_sites + site) * FIELDS
    rank = tl.load(table + at + 3)
    add_out = tl.load(table + at + 2)
    gain = tl.where(maps != 0, tl.load(table + at + 5), -1)
    if (rank == 0) & (add_out < 0) & (gain < 0):
        return
    n = first + tl.arange(0, BLOCK_N)
    inside = n < out_features
    a_start, b_start = tl.load(table + at), arena + tl.multiple_of(tl.load(table + at + 1), ALIGN) + n[None, :]
    scale = tl.load(scales + at + 4).to(tl.float32)
    weight = tl.load(tile_scales + tl.program_id(0) * TILE_FIELDS + 4)
    stored = rank if TOKEN else whole(rank)
    for m in range(count):
        row = tl.load(tile) + m
        if TOKEN:
            xa_row = arena + a_start + tl.load(source + row) * rank
        else:
            xa_row = source + member.to(tl.int64) * member_stride + (tl.load(tile + 1) + m).to(tl.int64) * width
        acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for start in tl.range(0, rank, BLOCK_R, num_stages=STAGES):
            r = start + tl.arange(0, BLOCK_R)
            parts = tl.arange(0, SPLITS).to(tl.int64)[:, None] * split_stride + r[None, :]  # at once: one load a thread
            xa_part = tl.sum(tl.load(xa_row + parts, mask=(r < stored)[None, :], other=0.0).to(tl.float32), 0)
            b_mask = (r < rank)[:, None] & inside[None, :]
            b_part = tl.load(b_start + r.to(tl.int64)[:, None] * out_features, mask=b_mask, other=0.0)
            acc += tl.sum(b_part.to(tl.float32) * xa_part[:, None], 0)
        delta = acc[None, :] * scale
        if add_out >= 0:
            bias = tl.load(arena + tl.multiple_of(add_out, ALIGN) + n, mask=inside, other=0.0)
            delta += bias.to(tl.float32)[None, :]
        out = y + row.to(tl.int64) * y_stride + n[None, :]
        new = tl.load(out, mask=inside[None, :], other=0.0).to(tl.float32)
        if gain >= 0:
            delta += mapped(new, out, arena, table + at, n, inside[None, :], inside, ALIGN)
        tl.store(out, (new + delta * weight).to(y0.dtype.element_ty), mask=inside[None, :])
