"""ProgramTables: where in the arena buffer each program's operands lie, by site, on the host and on the device.

An operand is addressed in elements of the flat buffer. The host side serves the CPU bodies as views; the device side
is one int64 array that Triton kernels read, so that a new program costs one small copy and no new launch arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.touched import Touched

FIELDS = 9  # a, b, add_out, rank, scale (the bits of a float64), gain, sine, group, gain_in
PAIR_BLOCK = 64  # a rotation's group divides it: both of a pair lie in one block of an expand
_FIRST_CAPACITY = 16
_VECTORS = {"add_out": "out_features", "gain": "out_features", "sine": "out_features", "gain_in": "in_features"}


@dataclass(frozen=True, slots=True)
class Operands:
    """One program at one site, as element offsets into the buffer.

    Linear site: a -> A [rank, in_features], b -> B [rank, out_features].
    Embedding (token=True): a -> A [vocabulary, rank], b -> B [rank, width].
    add_out -> [out_features], or -1 for none. rank 0: no low-rank part, a and b are not read.

    Vectors of linear sites, -1 for none. gain -> [out_features]: the base's output times 1 + gain. sine ->
    [out_features], beside a gain: a rotation of pairs (ops/rotate.py), whose cosine less one is the gain; a pair lies
    half a group apart, and the group divides PAIR_BLOCK. gain_in -> [in_features]: the base's input times 1 + gain_in.
    """

    rank: int
    scale: float
    a: int
    b: int
    add_out: int = -1
    token: bool = False
    gain: int = -1
    sine: int = -1
    group: int = 0
    gain_in: int = -1

    @property
    def changes_output(self) -> bool:
        """Whether an expand has anything to do."""
        return self.rank > 0 or self.add_out >= 0 or self.gain >= 0

    @property
    def starts(self) -> tuple[int, ...]:
        """Every offset that there is."""
        vectors = (self.add_out, self.gain, self.sine, self.gain_in)
        return (self.a, self.b, *(start for start in vectors if start >= 0))


@dataclass(frozen=True)
class SiteShape:
    """Sizes of a site; for an embedding in_features is the vocabulary and out_features the width."""

    in_features: int
    out_features: int


class Use(NamedTuple):
    """A segment of a plan and what its program does at a site."""

    segment: Segment
    op: Operands


class ProgramRow(NamedTuple):
    """A program's operands by site, and its row of the device table that says the same: [n_sites, FIELDS] int64.

    rank: the largest at any site."""

    operands: Mapping[int, Operands]
    table: Tensor
    is_aligned: bool
    rank: int
    touched: Touched


class ProgramTables:
    """The installed programs. Handles are unique and growing; a program's operands never change once installed.

    alignment: what every offset so far is a multiple of, in elements: 16 bytes' worth, or 1. Kernels load
    whole vectors in the first case.
    """

    def __init__(self, buffer: Tensor, sites: Sequence[SiteShape]) -> None:
        """buffer: the arena, 1-D, contiguous, of the model's dtype. A site's index is its position in ``sites``."""
        if buffer.dim() != 1 or not buffer.is_contiguous() or not buffer.is_floating_point():
            raise ValueError(f"buffer: must be 1-D, contiguous and floating, not {buffer.dtype} {tuple(buffer.shape)}")
        self.buffer = buffer
        self.sites = tuple(sites)
        self._programs: dict[int, Mapping[int, Operands]] = {}
        self._tokens: dict[int, frozenset[int]] = {}
        self._rows: dict[int, int] = {}
        self._ranks: dict[int, int] = {}  # of each program, the largest
        self._touches: dict[int, Touched] = {}
        self._last_handle = -1
        self._removals = 0
        self.alignment = 16 // buffer.element_size()
        self._device_table = self._new_table(_FIRST_CAPACITY)
        self.device_scales = self._device_table.view(torch.float64)
        self._free_rows = list(range(_FIRST_CAPACITY))[::-1]

    @property
    def device_table(self) -> Tensor:
        """[capacity, n_sites, FIELDS] int64 on the buffer's device. Replaced by a larger one when it is full.
        device_scales: the same memory as float64, which the scales in it are."""
        return self._device_table

    def row_of(self, operands: Mapping[int, Operands], block: range | None = None) -> ProgramRow:
        """What ``install`` takes, made before it in any thread. block: where in the buffer the program lies; None for
        anywhere. Raises ValueError for an operand outside."""
        within = range(self.buffer.numel()) if block is None else block
        for site, op in operands.items():
            self._check(site, op, within)
        whole = 16 // self.buffer.element_size()
        is_aligned = not any(start % whole for op in operands.values() for start in op.starts)
        rank = max((op.rank for op in operands.values()), default=0)
        return ProgramRow(dict(operands), self._encode(operands), is_aligned, rank, Touched.of(operands))

    def install(self, handle: int, program: Mapping[int, Operands] | ProgramRow) -> None:
        """Make a program usable by plans. Raises ValueError for a reused handle or an operand outside the buffer."""
        if handle <= self._last_handle:
            raise ValueError(f"handle: {handle} was given before; allowed is above {self._last_handle}")
        ready = program if isinstance(program, ProgramRow) else self.row_of(program)
        if not ready.is_aligned:
            self.alignment = 1
        self._last_handle = handle
        self._programs[handle] = ready.operands
        self._tokens[handle] = frozenset(site for site, op in ready.operands.items() if op.token)
        self._ranks[handle], self._touches[handle] = ready.rank, ready.touched
        self._rows[handle] = row = self._take_row()
        self._device_table[row].copy_(ready.table, non_blocking=True)

    def remove(self, handle: int) -> None:
        """Forget a program. Raises KeyError where it is not installed."""
        del self._programs[handle], self._tokens[handle], self._ranks[handle], self._touches[handle]
        self._free_rows.append(self._rows.pop(handle))
        self._removals += 1

    def row(self, handle: int) -> int:
        """The program's row in the device table. Raises KeyError where it is not installed."""
        return self._rows[handle]

    def rank(self, handle: int) -> int:
        """The program's largest rank at any site. Raises KeyError where it is not installed."""
        return self._ranks[handle]

    def operands(self, handle: int) -> Mapping[int, Operands]:
        """The program's operands by site. Raises KeyError where it is not installed."""
        return self._programs[handle]

    def check(self, plan: BatchPlan) -> None:
        """Raise KeyError where the plan names a program that is not installed."""
        plan.memo((self, "installed", self._removals), lambda: self._require(plan))

    def active(self, site: int, plan: BatchPlan) -> bool:
        """Whether any program of the plan changes the site's output."""
        return site in self.touched(plan).outputs

    def touched(self, plan: BatchPlan) -> Touched:
        """The sites that any program of the plan touches."""
        self.check(plan)
        return plan.memo((self, "touched"), lambda: Touched.any_of([self._touches[handle] for handle in plan.handles]))

    def touch(self, plan: BatchPlan, sites: Touched) -> None:
        """Count these sites as touched by a plan without segments, before anything asks: others are written over it."""
        plan.memo((self, "touched"), lambda: sites)

    def largest_rank(self, plan: BatchPlan) -> int:
        """The largest rank that the plan's programs have at any site."""
        self.check(plan)
        return plan.memo((self, "rank"), lambda: max((self._ranks[handle] for handle in plan.handles), default=0))

    def uses(self, site: int, plan: BatchPlan, *, token: bool = False) -> tuple[Use, ...]:
        """The plan's segments whose program touches the site, with its operands."""
        self.check(plan)
        return plan.memo((self, "uses", site, token), lambda: self._uses(site, plan, token))

    def token_sites(self, handles: Iterable[int]) -> frozenset[int]:
        """Sites where one of the programs has an embedding's operands."""
        return frozenset().union(*(self._tokens[handle] for handle in handles))

    def uses_of(self, site: int, segments: Iterable[Segment]) -> Iterator[Use]:
        """As ``uses``, of these segments only. The programs must be installed."""
        for segment in segments:
            op = self._programs[segment.handle].get(site)
            if op is not None:
                if op.token:
                    raise wrong_operands(site)
                yield Use(segment, op)

    def max_rank(self, sites: Sequence[int], plan: BatchPlan) -> int:
        """The largest rank that the plan's programs have at any of the sites."""
        key = (self, "max_rank", tuple(sites))
        self.check(plan)
        return plan.memo(key, lambda: max((u.op.rank for s in sites for u in self._uses(s, plan)), default=0))

    def factors(self, site: int, op: Operands) -> tuple[Tensor, Tensor]:
        """Views of the buffer: A [rank, in_features] (token: [vocabulary, rank]) and B [rank, out_features]."""
        shape = self.sites[site]
        rows, columns = (shape.in_features, op.rank) if op.token else (op.rank, shape.in_features)
        a = self.buffer[op.a : op.a + rows * columns].view(rows, columns)
        return a, self.buffer[op.b : op.b + op.rank * shape.out_features].view(op.rank, shape.out_features)

    def add_out(self, site: int, op: Operands) -> Tensor:
        """View of the buffer: [out_features]. The operand has one: op.add_out >= 0."""
        return self.vector(op.add_out, self.sites[site].out_features)

    def vector(self, start: int, width: int) -> Tensor:
        """View of the buffer: [width]."""
        return self.buffer[start : start + width]

    def _require(self, plan: BatchPlan) -> bool:
        missing = sorted(plan.handles - self._programs.keys())
        if missing:
            raise KeyError(f"plan: programs {missing} are not installed")
        return True

    def _uses(self, site: int, plan: BatchPlan, token: bool | None = None) -> tuple[Use, ...]:
        found = ((segment, self._programs[segment.handle].get(site)) for segment in plan.segments)
        uses = tuple(Use(segment, op) for segment, op in found if op is not None)
        if token is not None and any(use.op.token is not token for use in uses):
            raise wrong_operands(site)
        return uses

    def _check(self, site: int, op: Operands, within: range) -> None:
        if not 0 <= site < len(self.sites):
            raise ValueError(f"site: {site} is not one of the {len(self.sites)} sites")
        if op.rank < 0 or not math.isfinite(op.scale):
            raise ValueError(f"site {site}: rank {op.rank} and scale {op.scale} must be >= 0 and finite")
        shape = self.sites[site]
        if op.rank:
            self._check_block(site, "a", op.a, op.rank * shape.in_features, within)
            self._check_block(site, "b", op.b, op.rank * shape.out_features, within)
        for field, width in _VECTORS.items():
            if getattr(op, field) != -1:
                self._check_block(site, field, getattr(op, field), getattr(shape, width), within)
        if op.sine != -1 and (op.gain == -1 or not _divides(op.group, math.gcd(PAIR_BLOCK, shape.out_features))):
            raise ValueError(
                f"site {site}: group {op.group} must be even, divide {PAIR_BLOCK} and the width, with a gain"
            )

    def _check_block(self, site: int, field: str, offset: int, size: int, within: range) -> None:
        if offset < within.start or offset + size > within.stop:
            where = f"[{within.start}, {within.stop}) of the buffer"
            raise ValueError(f"site {site}: {field} [{offset}, {offset + size}) is outside {where}")

    def _encode(self, operands: Mapping[int, Operands]) -> Tensor:
        """[n_sites, FIELDS] int64 on the host, pinned for CUDA."""
        pinned = self.buffer.is_cuda
        table = torch.zeros((len(self.sites), FIELDS), dtype=torch.int64, pin_memory=pinned)
        table[:, [2, 5, 6, 8]] = -1
        if operands:
            where = list(operands)
            table[where] = torch.tensor(
                [
                    (op.a, op.b, op.add_out, op.rank, 0, op.gain, op.sine, op.group, op.gain_in)
                    for op in operands.values()
                ],
                dtype=torch.int64,
            )
            table.view(torch.float64)[where, 4] = torch.tensor(
                [op.scale for op in operands.values()], dtype=torch.float64
            )
        return table

    def _new_table(self, capacity: int) -> Tensor:
        shape = (capacity, len(self.sites), FIELDS)
        return torch.zeros(shape, dtype=torch.int64, device=self.buffer.device)

    def _take_row(self) -> int:
        if not self._free_rows:
            old = self._device_table
            self._device_table = self._new_table(2 * old.shape[0])
            self._device_table[: old.shape[0]].copy_(old)
            self.device_scales = self._device_table.view(torch.float64)
            self._free_rows = list(range(old.shape[0], 2 * old.shape[0]))[::-1]
        return self._free_rows.pop()


def wrong_operands(site: int) -> ValueError:
    """What is raised where a site reads its operands by the wrong one of expand and token_low_rank."""
    return ValueError(f"site {site}: token operands are read by token_low_rank, the others by expand")


def _divides(group: int, width: int) -> bool:
    return group > 0 and group % 2 == 0 and width % group == 0
