"""The Triton body: segmented shrink and expand over an arena addressed by tables (after Punica's SGMV, S-LoRA).

A launch covers tiles (row blocks of one segment) of any mix of programs and ranks. A tile reads its program's offsets,
rank and scale from the device table; rank tails are masked, a site that the program does not touch returns at once.

Configuration, chosen by shape and never by trial at run time:
- BLOCK_M 16 for decode, 32 or 64 where a segment is longer (tiles.block_rows).
- shrink: BLOCK_K 256 bytes (128 for taller tiles), BLOCK_R the largest rank's power of two, 16 to 128 bytes' worth;
  for decode, K is split into parts of 512 over the grid, because a few tiles alone leave most of the device idle.
  Parts are summed in expand in a fixed order: no atomics, equal results run to run.
- expand: BLOCK_N 64 for decode (more programs in flight), 128 for taller tiles; BLOCK_R as in shrink.

Triton compiles anew for each class of an argument (one, a multiple of 16, aligned or not), which would stall a step.
So what changes with the batch is exempt, or always a multiple of 16: xa's rows are padded to that.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from onebase.kernels.base import Shrunk, own
from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.tables import FIELDS, Operands, ProgramTables
from onebase.kernels.tiles import ROWS_BY_BLOCK, TILE_FIELDS, Tiles, tiles_of

_SPLIT_SIZE = 512
_MAX_SPLITS = 8


@triton.jit
def _dot(left, right, WIDE: tl.constexpr):
    """fp32 accumulation. WIDE: products in fp32 too, for the interpreter, which cannot multiply bf16."""
    if WIDE:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(left, right, input_precision="ieee")


@triton.jit(do_not_specialize=["packed_rows", "group_size"])
def _shrink_kernel(
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
    member = tl.program_id(2) // SPLITS
    split = tl.program_id(2) % SPLITS
    entry = table + (tl.load(tile + 3).to(tl.int64) * n_sites + tl.load(sites + member)) * FIELDS
    rank = tl.load(entry + 3)
    first_r = tl.program_id(1) * BLOCK_R
    if first_r >= rank:
        return
    m = tl.arange(0, BLOCK_M)
    r = first_r + tl.arange(0, BLOCK_R)
    here = m < tl.load(tile + 2)
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
    tl.store(out, acc, mask=here[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["site"])
def _expand_kernel(
    y,  # [rows, out_features], row stride y_stride
    arena,
    table,  # [programs, n_sites, FIELDS] int64
    scales,  # the table read as float64
    tiles,  # [n_tiles, TILE_FIELDS] int32, of one layer
    tile_scales,  # the tiles read as float32
    source,  # linear: xa of the site's member, fp32; token: the token ids, int64
    y_stride,
    out_features,
    site,
    n_sites,
    split_stride,  # elements between the parts of xa
    width,
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
    """Grid: (tiles of the layer, column blocks)."""
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    at = (tl.load(tile + 3).to(tl.int64) * n_sites + site) * FIELDS
    rank = tl.load(table + at + 3)
    add_out = tl.load(table + at + 2)
    if (rank == 0) & (add_out < 0):
        return
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = m < tl.load(tile + 2)
    rows = tl.load(tile) + m
    b_start = arena + tl.multiple_of(tl.load(table + at + 1), ALIGN) + n[None, :]
    if TOKEN:
        tokens = tl.load(source + rows, mask=here, other=0)
        xa_rows = arena + tl.load(table + at) + tokens[:, None] * rank
    else:
        xa_rows = source + (tl.load(tile + 1) + m).to(tl.int64)[:, None] * width
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = here[:, None] & (r < rank)[None, :]
        xa_tile = tl.load(xa_rows + r[None, :], mask=inside, other=0.0)  # [BLOCK_M, BLOCK_R]
        for part in tl.static_range(1, SPLITS):
            xa_tile += tl.load(xa_rows + part * split_stride + r[None, :], mask=inside, other=0.0)
        b_mask = (r < rank)[:, None] & (n < out_features)[None, :]
        b_tile = tl.load(b_start + r.to(tl.int64)[:, None] * out_features, mask=b_mask, other=0.0)
        acc += _dot(xa_tile.to(b_tile.dtype), b_tile, WIDE)
    acc = acc * tl.load(scales + at + 4).to(tl.float32)
    if add_out >= 0:
        bias = tl.load(arena + add_out + n, mask=n < out_features, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out = y + rows.to(tl.int64)[:, None] * y_stride + n[None, :]
    mask = here[:, None] & (n < out_features)[None, :]
    new = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    new += acc * tl.load(tile_scales + tl.program_id(0) * TILE_FIELDS + 4)
    tl.store(out, new.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class TritonShrunk(Shrunk):
    """xa: [splits, group, packed_rows, width] fp32; width: the largest rank, up to a multiple of 16."""

    group: tuple[int, ...]
    xa: Tensor


class TritonKernels:
    """See LowRankKernels. x and y may be fp32, bf16 or fp16. Runs under TRITON_INTERPRET=1 on the CPU."""

    name = "triton"

    def __init__(self, tables: ProgramTables) -> None:
        self._tables = tables
        self._groups: dict[tuple[int, ...], Tensor] = {}

    def shrink(self, x: Tensor, group: tuple[int, ...], plan: BatchPlan) -> TritonShrunk:
        tables, tiles = self._tables, tiles_of(plan, self._tables)
        _require_rows("x", x)
        width = _padded(tables.max_rank(group, plan))
        in_features = x.shape[1]
        splits = _splits(tiles, in_features)
        xa = torch.empty((splits, len(group), tiles.packed_rows, width), dtype=torch.float32, device=x.device)
        block_r = _block_r(width, tables.buffer)
        _shrink_kernel[(tiles.count, triton.cdiv(width, block_r), len(group) * splits)](
            x, tables.buffer, tables.device_table, tiles.data, self._group(group), xa,
            x.stride(0), in_features, len(tables.sites), tiles.packed_rows, width, len(group),
            BLOCK_M=tiles.block_m, BLOCK_R=block_r, BLOCK_K=_block_k(tiles, tables.buffer), SPLITS=splits,
            WIDE=not x.is_cuda, ALIGN=tables.alignment, FIELDS=FIELDS, TILE_FIELDS=TILE_FIELDS,
        )  # fmt: skip
        return TritonShrunk(group, xa)

    def expand(self, y: Tensor, shrunk: Shrunk, site: int, plan: BatchPlan) -> None:
        mine = own(shrunk, TritonShrunk)
        if not self._tables.uses(site, plan):
            return
        splits, _, packed_rows, width = mine.xa.shape
        member = mine.xa[:, mine.group.index(site)]
        stride = len(mine.group) * packed_rows * width
        self._expand(y, member, site, plan, splits=splits, split_stride=stride, width=width, token=False)

    def token_low_rank(self, y: Tensor, tokens: Tensor, site: int, plan: BatchPlan) -> None:
        if self._tables.uses(site, plan, token=True):
            width = _padded(self._tables.max_rank((site,), plan))
            self._expand(y, tokens.contiguous(), site, plan, splits=1, split_stride=0, width=width, token=True)

    def forget(self, handle: int) -> None:
        """Nothing is cached of a program."""

    def warm_up(self) -> None:
        """Every block shape at every shape of site, with programs of zeros."""
        buffer, sites = self._tables.buffer, self._tables.sites
        shapes = {shape: site for site, shape in enumerate(sites)}
        widest = max(max(shape.in_features, shape.out_features) for shape in shapes)
        ranks = [rank for rank in (16, 32, 64, 128) if rank == _block_r(rank, buffer)]
        for token in (False, True):
            tables = ProgramTables(buffer.new_zeros(ranks[-1] * widest), sites)
            for handle, rank in enumerate(ranks):
                tables.install(handle, {site: Operands(rank, 1.0, 0, 0, token=token) for site in shapes.values()})
                for rows in ROWS_BY_BLOCK:
                    plan = BatchPlan(rows, (Segment(0, rows, handle),))
                    for site in shapes.values():
                        TritonKernels(tables)._launch_once(site, plan, token)

    def _launch_once(self, site: int, plan: BatchPlan, token: bool) -> None:
        shape, buffer = self._tables.sites[site], self._tables.buffer
        y = buffer.new_zeros(plan.num_rows, shape.out_features)
        if token:
            self.token_low_rank(y, torch.zeros(plan.num_rows, dtype=torch.int64, device=buffer.device), site, plan)
        else:
            x = buffer.new_zeros(plan.num_rows, shape.in_features)
            self.expand(y, self.shrink(x, (site,), plan), site, plan)

    def _expand(
        self,
        y: Tensor,
        source: Tensor,
        site: int,
        plan: BatchPlan,
        *,
        splits: int,
        split_stride: int,
        width: int,
        token: bool,
    ) -> None:
        _require_rows("y", y)
        tables, tiles = self._tables, tiles_of(plan, self._tables)
        block_n, block_r = 64 if tiles.block_m == 16 else 128, _block_r(width, tables.buffer)
        for start, stop in tiles.layers:
            layer = tiles.data[start:stop]
            _expand_kernel[(stop - start, triton.cdiv(y.shape[1], block_n))](
                y, tables.buffer, tables.device_table, tables.device_table.view(torch.float64),
                layer, layer.view(torch.float32), source,
                y.stride(0), y.shape[1], site, len(tables.sites), split_stride, width,
                BLOCK_M=tiles.block_m, BLOCK_N=block_n, BLOCK_R=block_r, SPLITS=splits, TOKEN=token,
                WIDE=not y.is_cuda, ALIGN=tables.alignment, FIELDS=FIELDS, TILE_FIELDS=TILE_FIELDS,
            )  # fmt: skip

    def _group(self, group: tuple[int, ...]) -> Tensor:
        if group not in self._groups:
            host = torch.tensor(group, dtype=torch.int32)
            cuda = self._tables.buffer.is_cuda
            self._groups[group] = host.pin_memory().cuda(non_blocking=True) if cuda else host
        return self._groups[group]


def _splits(tiles: Tiles, in_features: int) -> int:
    if tiles.block_m > 16:
        return 1
    return max(1, min(_MAX_SPLITS, in_features // _SPLIT_SIZE))


def _padded(rank: int) -> int:
    return max(16, -(-rank // 16) * 16)


def _block_r(rank: int, buffer: Tensor) -> int:
    """Rank block: a power of two from 16 to 128 bytes' worth."""
    return max(16, min(128 // buffer.element_size(), 1 << max(0, rank - 1).bit_length()))


def _block_k(tiles: Tiles, buffer: Tensor) -> int:
    return (256 if tiles.block_m == 16 else 128) // buffer.element_size()


def _require_rows(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2 or tensor.stride(1) != 1:
        raise ValueError(f"{name}: must be 2-D with last stride 1, not {tuple(tensor.shape)}, {tensor.stride()}")
