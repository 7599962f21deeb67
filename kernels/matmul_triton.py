"""The Triton body: segmented shrink and expand over an arena addressed by tables (after Punica's SGMV, S-LoRA).

A launch covers tiles (row blocks of one segment) of any mix of programs and ranks. A tile reads its program's offsets,
rank and scale from the device table; rank tails are masked, a site that the program does not touch returns at once.

Tiles of a few rows go through row_kernels.py, taller ones through tensor cores with a BLOCK_M of 16, 32 or 64
(tiles.block_rows); the other block shapes are config.py's, chosen by shape and never by trial at run time. Where K is
split over the grid, its parts are summed in expand in a fixed order: no atomics, equal results run to run.

A launch reads its plan from the tiles' device buffer alone. Tiles without rows return at once, so that a captured graph
may be replayed over other plans (fixed_plan.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from onebase.kernels.base import NOTHING, Shrunk, own
from onebase.kernels.config import Config, Configs, Op, Shape
from onebase.kernels.matmul_kernels import expand_kernel, scale_in_kernel, shrink_kernel
from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.row_kernels import expand_rows_kernel, shrink_rows_kernel
from onebase.kernels.sizes import cdiv
from onebase.kernels.tables import FIELDS, ProgramTables, SiteShape
from onebase.kernels.tiles import FEW_ROWS, ROWS_BY_BLOCK, TILE_FIELDS, Tiles, tiles_of
from onebase.kernels.vectors import Vectors
from onebase.kernels.warm_up import warm_plan, zero_programs

SLICES = 3  # outputs of one expand: q, k and v
_TILE_ELEMENTS = 4096  # of a scale_in


class Slice(NamedTuple):
    """An output that an expand adds to: of a site, whose xa has the place ``member`` in its group."""

    y: Tensor
    site: int
    member: int


@dataclass(frozen=True, slots=True)
class TritonShrunk(Shrunk):
    """xa: [splits, group, packed_rows, width] fp32; width: the largest rank, up to a multiple of 16."""

    group: tuple[int, ...]
    xa: Tensor


class TritonKernels:
    """See LowRankKernels. x and y may be fp32, bf16 or fp16. Runs under TRITON_INTERPRET=1 on the CPU."""

    name = "triton"

    def __init__(self, tables: ProgramTables, configs: Configs | None = None) -> None:
        """configs: the device's where not given."""
        self._tables = tables
        self._configs = Configs.of_device(tables.buffer.device) if configs is None else configs
        self._vectors = Vectors(tables)
        self._groups: dict[tuple[int, ...], Tensor] = {}

    def shrink(self, x: Tensor, group: tuple[int, ...], plan: BatchPlan) -> TritonShrunk:
        tables, tiles = self._tables, tiles_of(plan, self._tables)
        _require_rows("x", x)
        width, config = self._choose("shrink", group, plan)
        splits = config.splits
        xa = torch.empty((splits, len(group), tiles.packed_rows, width), dtype=torch.float32, device=x.device)
        if not self._rank(group, plan):
            return TritonShrunk(group, xa)  # vectors alone: nothing reads it
        few, planes = tiles.block_m == FEW_ROWS, len(group) * splits
        kernel = shrink_rows_kernel if few else shrink_kernel
        grid = (len(tiles.shrinks), planes) if few else (len(tiles.shrinks), cdiv(width, config.block_r), planes)
        kernel[grid](
            x, tables.buffer, tables.device_table, tiles.shrinks, self._group(group), xa,
            x.stride(0), x.shape[1], len(tables.sites), tiles.packed_rows, width, len(group),
            BLOCK_R=config.block_r, BLOCK_K=config.block, SPLITS=splits, ALIGN=tables.alignment, FIELDS=FIELDS,
            TILE_FIELDS=TILE_FIELDS, num_warps=config.num_warps, num_stages=config.num_stages, **_tall(tiles, x),
        )  # fmt: skip
        return TritonShrunk(group, xa)

    def expand(self, y: Tensor, shrunk: Shrunk, site: int, plan: BatchPlan) -> None:
        self.expand_group((y,), shrunk, (site,), plan)

    def expand_group(
        self,
        ys: Sequence[Tensor],
        shrunk: Shrunk,
        sites: tuple[int, ...],
        plan: BatchPlan,
        origins: Mapping[int, Tensor] = NOTHING,
    ) -> None:
        mine = own(shrunk, TritonShrunk)
        if not self._acts(sites, plan):
            return
        maps = not origins and self._reads_base(plan)
        if not maps:
            self._vectors.map_outputs(ys, sites, plan, origins)
        _, config = self._choose("expand", sites, plan)
        slices = [Slice(y, site, mine.group.index(site)) for y, site in zip(ys, sites, strict=True)]
        for at in range(0, len(slices), SLICES):
            self._expand(slices[at : at + SLICES], mine.xa, plan, config, maps=maps)

    def scale_in(self, target: Tensor, x: Tensor, site: int, plan: BatchPlan) -> None:
        tables, tiles = self._tables, tiles_of(plan, self._tables)
        if site not in tables.touched(plan).inputs:
            return
        _require_rows("x", x)
        _require_rows("target", target)
        width, block = x.shape[1], _TILE_ELEMENTS // tiles.block_m
        for layer, scales in tiles.by_layer:
            scale_in_kernel[(layer.shape[0], cdiv(width, block))](
                target, x, tables.buffer, tables.device_table, layer, scales,
                target.stride(0), x.stride(0), width, site, len(tables.sites),
                BLOCK_M=tiles.block_m, BLOCK_N=block, ALIGN=tables.alignment, FIELDS=FIELDS, TILE_FIELDS=TILE_FIELDS,
            )  # fmt: skip

    def token_low_rank(self, y: Tensor, tokens: Tensor, site: int, plan: BatchPlan) -> None:
        if tiles_of(plan, self._tables).fixed or self._tables.uses(site, plan, token=True):
            _, config = self._choose("token", (site,), plan)
            self._expand([Slice(y, site, 0)], tokens.contiguous(), plan, config, token=True, maps=False)

    def forget(self, handle: int) -> None:
        """Nothing is cached of a program."""

    def warm_up(self, groups: Iterable[tuple[int, ...]] = ()) -> None:
        """Every block shape at every shape of site and of group, with programs of zeros; and every tuned one that may
        come. Rank 128 stands for all beyond 64."""
        shapes = {shape: site for site, shape in enumerate(self._tables.sites)}
        kinds = {tuple(self._tables.sites[site] for site in group): group for group in groups}
        kinds |= {(shape,): (site,) for shape, site in shapes.items()}
        widest = max(max(shape.in_features, shape.out_features) for shape in shapes)
        ranks = [*(rank for rank in (16, 32, 64) if rank <= 128 // self._tables.buffer.element_size()), 128]
        zeros = self._tables.buffer.new_zeros(ranks[-1] * widest)
        for token in (False, True):
            for rank in ranks:
                programs = zero_programs(zeros, self._tables.sites, rank, 1, token)
                for rows in ROWS_BY_BLOCK.values():
                    plan = BatchPlan(rows, (Segment(0, rows, 0),))
                    for group in kinds.values():
                        if len(group) == 1 or not token:
                            TritonKernels(programs, Configs())._launch_once(group, plan, token)
        self._warm_up_tuned(shapes)

    def _warm_up_tuned(self, shapes: Mapping[SiteShape, int]) -> None:
        sites = self._tables.sites
        for shape in self._configs.tuned:
            group = tuple(shapes.get(SiteShape(shape.h_in, width), -1) for width in shape.slices)
            if -1 in group or shape.dtype != str(self._tables.buffer.dtype).removeprefix("torch."):
                continue
            zeros = self._tables.buffer.new_zeros(shape.rank * max(shape.h_in, *shape.slices))
            programs = zero_programs(zeros, sites, shape.rank, shape.distinct, shape.op == "token")
            alone = Configs({shape: self._configs.get(shape)})  # beside a shrink that splits K as the heuristic does
            for configs in (self._configs, alone):
                TritonKernels(programs, configs)._launch_once(group, warm_plan(shape), shape.op == "token")

    def _launch_once(self, group: tuple[int, ...], plan: BatchPlan, token: bool) -> None:
        buffer, sites = self._tables.buffer, self._tables.sites
        ys = [buffer.new_zeros(plan.num_rows, sites[site].out_features) for site in group]
        if token:
            tokens = torch.zeros(plan.num_rows, dtype=torch.int64, device=buffer.device)
            for y, site in zip(ys, group, strict=True):
                self.token_low_rank(y, tokens, site, plan)
        else:
            x = buffer.new_zeros(plan.num_rows, sites[group[0]].in_features)
            self.scale_in(torch.zeros_like(x), x, group[0], plan)
            self.expand_group(ys, self.shrink(x, group, plan), group, plan)

    def _acts(self, sites: tuple[int, ...], plan: BatchPlan) -> bool:
        """Whether an expand has anything to do. Raises ValueError where a site has an embedding's operands."""

        def acts() -> bool:
            for site in () if tiles_of(plan, self._tables).fixed else sites:
                self._tables.uses(site, plan)
            return any(self._tables.active(site, plan) for site in sites)

        self._tables.check(plan)
        return plan.memo((self, "acts", sites), acts)

    def _reads_base(self, plan: BatchPlan) -> bool:
        """Whether each row has one expand, which finds what the base gave. A fixed plan takes no others with maps."""
        return tiles_of(plan, self._tables).fixed is not None or len(plan.layers) < 2

    def _expand(
        self, slices: list[Slice], source: Tensor, plan: BatchPlan, config: Config, *, maps: bool, token: bool = False
    ) -> None:
        """One launch for each layer of the plan. source: xa, or the token ids."""
        tables, tiles = self._tables, tiles_of(plan, self._tables)
        for one in slices:
            _require_rows("y", one.y)
        blocks = sum(cdiv(one.y.shape[1], config.block) for one in slices)
        padded = slices + [slices[0]] * (SLICES - len(slices))
        widths = [one.y.shape[1] if at < len(slices) else 0 for at, one in enumerate(padded)]
        splits, strides = (
            (1, (0, 0, 16)) if token else (len(source), (source.stride(1), source.stride(0), source.shape[3]))
        )
        kernel = expand_rows_kernel if tiles.block_m == FEW_ROWS else expand_kernel
        for layer, scales in tiles.by_layer:
            kernel[(layer.shape[0], blocks)](
                *(one.y for one in padded), tables.buffer, tables.device_table, tables.device_scales,
                layer, scales, source,
                *(one.y.stride(0) for one in padded), *widths,
                *(one.site for one in padded), *(one.member for one in padded), len(tables.sites),
                *strides, int(maps),
                BLOCK_N=config.block, BLOCK_R=config.block_r, SPLITS=splits, TOKEN=token, ALIGN=tables.alignment,
                FIELDS=FIELDS, TILE_FIELDS=TILE_FIELDS, num_warps=config.num_warps, num_stages=config.num_stages,
                **(_tall(tiles, source) or {"STAGES": config.num_stages}),
            )  # fmt: skip

    def shape(self, op: Op, group: tuple[int, ...], plan: BatchPlan) -> Shape:
        """What a launch's configuration is looked up by."""
        tables, tiles = self._tables, tiles_of(plan, self._tables)
        return Shape.of(
            op,
            tables.buffer.dtype,
            tables.sites[group[0]].in_features,
            tuple(tables.sites[site].out_features for site in group),
            rank=self._rank(group, plan),
            block_m=tiles.block_m,
            rows=plan.num_rows,
            distinct=tiles.fixed.max_tiles if tiles.fixed else len(plan.handles),
        )

    def _choose(self, op: Op, group: tuple[int, ...], plan: BatchPlan) -> tuple[int, Config]:
        """The width of xa, a multiple of 16, and the configuration; once per plan."""

        def choose() -> tuple[int, Config]:
            return _padded(self._rank(group, plan)), self._configs.get(self.shape(op, group, plan))

        return plan.memo((self, "config", op, group), choose)

    def _rank(self, group: tuple[int, ...], plan: BatchPlan) -> int:
        fixed = tiles_of(plan, self._tables).fixed
        return fixed.max_rank if fixed else self._tables.max_rank(group, plan)

    def _group(self, group: tuple[int, ...]) -> Tensor:
        if group not in self._groups:
            host = torch.tensor(group, dtype=torch.int32)
            cuda = self._tables.buffer.is_cuda
            self._groups[group] = host.pin_memory().cuda(non_blocking=True) if cuda else host
        return self._groups[group]


def _tall(tiles: Tiles, of: Tensor) -> dict[str, int | bool]:
    """What kernels that use tensor cores take beside the others. WIDE: see matmul_kernels.py."""
    return {} if tiles.block_m == FEW_ROWS else {"BLOCK_M": tiles.block_m, "WIDE": not of.is_cuda}


def _padded(rank: int) -> int:
    return max(16, -(-rank // 16) * 16)


def _require_rows(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2 or tensor.stride(1) != 1:
        raise ValueError(f"{name}: must be 2-D with last stride 1, not {tuple(tensor.shape)}, {tensor.stride()}")
