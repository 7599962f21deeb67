"""The Triton kernels of segmented shrink and expand, and of vectors, over an arena addressed by tables.

matmul_triton.py launches them; where tiles have a few rows, those of row_kernels.py. An expand's epilogue adds a
program's bias, gain and rotation to what it stores anyway.

Triton compiles anew for each class of an argument (one, a multiple of 16, aligned or not), which would stall a step.
So what changes with the batch is exempt, or always a multiple of 16: xa's rows are padded to that.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(left, right, WIDE: tl.constexpr):
    """fp32 accumulation. WIDE: products in fp32 too, for the interpreter, which cannot multiply bf16."""
    if WIDE:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _expanded(xa, b, WIDE: tl.constexpr):
    """xa @ b with xa rounded to b's type. fp16 ends at 65504 and loses digits below 6e-5, which xa's scale may yet make
    good: so rows of an fp32 xa are brought to one size before they are rounded, and back after the product."""
    if b.dtype == tl.float16 and xa.dtype == tl.float32:
        largest = tl.maximum(tl.max(tl.abs(xa), 1), 1e-30)[:, None]
        return _dot((xa * (16384 / largest)).to(tl.float16), b, WIDE) * (largest / 16384)
    return _dot(xa.to(b.dtype), b, WIDE)


@triton.jit
def _slice_of(block, second, third, of0, of1, of2):
    """What belongs to the output whose columns the block has: blocks from ``second`` on are the next one's."""
    return tl.where(block >= third, of2, tl.where(block >= second, of1, of0))


@triton.jit
def output_of(
    block, y0, y1, y2, stride0, stride1, stride2, n0, n1, n2, site0, site1, site2, member0, member1, member2,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the slice that a column block of an expand belongs to: y, its row stride, its width, the site, the site's
    place in the group; and the block's first column."""
    second = tl.cdiv(n0, BLOCK_N)
    third = second + tl.cdiv(n1, BLOCK_N)
    y = _slice_of(block, second, third, y0, y1, y2)
    y_stride = _slice_of(block, second, third, stride0, stride1, stride2)
    out_features = _slice_of(block, second, third, n0, n1, n2)
    site = _slice_of(block, second, third, site0, site1, site2)
    member = _slice_of(block, second, third, member0, member1, member2)
    first = (block - _slice_of(block, second, third, 0, second, third)) * BLOCK_N
    return y, y_stride, out_features, site, member, first


@triton.jit
def whole(rank):
    """Up to a multiple of 16: xa holds zeros between, so that its rows are read in whole vectors."""
    return tl.cdiv(rank, 16) * 16


@triton.jit(do_not_specialize=["packed_rows", "group_size"])
def shrink_kernel(
    x,  # [rows, in_features], row stride x_stride
    arena,
    table,  # [programs, n_sites, FIELDS] int64
    tiles,  # [n_tiles, TILE_FIELDS] int32
    sites,  # [group] int32
    xa,  # [splits, group, packed_rows, width] fp32
    x_stride,
    in_features,
    n_sites,
    packed_rows,
    width,
    group_size,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
):
    """Grid: (tiles, rank blocks, group * SPLITS)."""
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    count = tl.load(tile + 2)
    if count == 0:
        return
    member = tl.program_id(2) // SPLITS
    split = tl.program_id(2) % SPLITS
    entry = table + (tl.load(tile + 3).to(tl.int64) * n_sites + tl.load(sites + member)) * FIELDS
    rank = tl.load(entry + 3)
    first_r = tl.program_id(1) * BLOCK_R
    if first_r >= rank:
        return
    m = tl.arange(0, BLOCK_M)
    r = first_r + tl.arange(0, BLOCK_R)
    here = m < count
    a_rows = arena + tl.multiple_of(tl.load(entry), ALIGN) + r.to(tl.int64)[:, None] * in_features
    x_rows = x + (tl.load(tile) + m).to(tl.int64)[:, None] * x_stride
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(split * BLOCK_K, in_features, BLOCK_K * SPLITS):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < in_features)[None, :]
        x_tile = tl.load(x_rows + k[None, :], mask=here[:, None] & inside, other=0.0)  # [BLOCK_M, BLOCK_K]
        a_tile = tl.load(a_rows + k[None, :], mask=(r < rank)[:, None] & inside, other=0.0)  # [BLOCK_R, BLOCK_K]
        acc += _dot(x_tile, tl.trans(a_tile), WIDE)
    plane = (split * group_size + member).to(tl.int64) * packed_rows
    out = xa + (plane + tl.load(tile + 1) + m)[:, None] * width + r[None, :]
    tl.store(out, acc, mask=here[:, None] & (r < whole(rank))[None, :])


@triton.jit
def mapped(y, out, arena, entry, n, mask, inside, ALIGN: tl.constexpr):
    """What a program's map adds to y [BLOCK_M, BLOCK_N] fp32, which lies at ``out``. n: the columns."""
    gain, sine = tl.load(entry + 5), tl.load(entry + 6)
    factor = tl.load(arena + tl.multiple_of(gain, ALIGN) + n, mask=inside, other=0.0)
    delta = y * factor.to(tl.float32)[None, :]
    if sine >= 0:
        turn = tl.load(arena + tl.multiple_of(sine, ALIGN) + n, mask=inside, other=0.0).to(tl.float32)
        delta += _turned(out, turn, tl.load(entry + 7).to(tl.int32), n, mask)
    return delta


@triton.jit
def _turned(out, turn, group, n, mask):
    """A pair (a, b), half a group apart, becomes (-b s, a s'). turn: s and s', by column."""
    half = group // 2
    is_first = (n % group) < half
    partner = out + tl.where(is_first, half, -half)[None, :]
    other = tl.load(partner, mask=mask, other=0.0).to(tl.float32)
    tl.debug_barrier()  # before another thread of the program stores there
    return other * tl.where(is_first, -turn, turn)[None, :]


@triton.jit(do_not_specialize=["site"])
def scale_in_kernel(
    target,  # [rows, in_features], row stride target_stride
    x,  # [rows, in_features], row stride x_stride
    arena,
    table,  # [programs, n_sites, FIELDS] int64
    tiles,  # [n_tiles, TILE_FIELDS] int32, of one layer
    tile_scales,  # the tiles read as float32
    target_stride,
    x_stride,
    in_features,
    site,
    n_sites,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
):
    """target += scale * gain * x. Grid: (tiles of the layer, column blocks)."""
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    count = tl.load(tile + 2)
    if count == 0:
        return
    gain = tl.load(table + (tl.load(tile + 3).to(tl.int64) * n_sites + site) * FIELDS + 8)
    if gain < 0:
        return
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (tl.load(tile) + m).to(tl.int64)[:, None]
    mask = (m < count)[:, None] & (n < in_features)[None, :]
    factor = tl.load(arena + tl.multiple_of(gain, ALIGN) + n, mask=n < in_features, other=0.0).to(tl.float32)
    factor *= tl.load(tile_scales + tl.program_id(0) * TILE_FIELDS + 4)
    source = tl.load(x + rows * x_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    out = target + rows * target_stride + n[None, :]
    new = tl.load(out, mask=mask, other=0.0).to(tl.float32) + source * factor[None, :]
    tl.store(out, new.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["site0", "site1", "site2", "member0", "member1", "member2", "maps"])
def expand_kernel(
    y0,  # three slices: outputs of sites of one group, [rows, n0], row stride stride0; those that are not there: n 0
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
    member0,  # their places in the group
    member1,
    member2,
    n_sites,
    member_stride,  # elements of xa between members
    split_stride,  # and between the parts of K
    width,
    maps,  # 1: y is what the base gave, and gains and rotations read it; 0: they are done already
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKEN: tl.constexpr,
    WIDE: tl.constexpr,
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
    m = tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, BLOCK_N)
    here = m < count
    rows = tl.load(tile) + m
    b_start = arena + tl.multiple_of(tl.load(table + at + 1), ALIGN) + n[None, :]
    if TOKEN:
        tokens = tl.load(source + rows, mask=here, other=0)
        xa_rows = arena + tl.load(table + at) + tokens[:, None] * rank
    else:
        xa_rows = source + member.to(tl.int64) * member_stride + (tl.load(tile + 1) + m).to(tl.int64)[:, None] * width
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    stored = rank if TOKEN else whole(rank)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = here[:, None] & (r < stored)[None, :]
        xa_tile = tl.load(xa_rows + r[None, :], mask=inside, other=0.0)  # [BLOCK_M, BLOCK_R]
        for part in tl.static_range(1, SPLITS):
            xa_tile += tl.load(xa_rows + part * split_stride.to(tl.int64) + r[None, :], mask=inside, other=0.0)
        b_mask = (r < rank)[:, None] & (n < out_features)[None, :]
        b_tile = tl.load(b_start + r.to(tl.int64)[:, None] * out_features, mask=b_mask, other=0.0)
        acc += _expanded(xa_tile, b_tile, WIDE)
    acc = acc * tl.load(scales + at + 4).to(tl.float32)
    if add_out >= 0:
        bias = tl.load(arena + tl.multiple_of(add_out, ALIGN) + n, mask=n < out_features, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out = y + rows.to(tl.int64)[:, None] * y_stride + n[None, :]
    mask = here[:, None] & (n < out_features)[None, :]
    new = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    if gain >= 0:
        acc += mapped(new, out, arena, table + at, n, mask, n < out_features, ALIGN)
    new += acc * tl.load(tile_scales + tl.program_id(0) * TILE_FIELDS + 4)
    tl.store(out, new.to(y0.dtype.element_ty), mask=mask)
