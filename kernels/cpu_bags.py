"""What the gather way does for one group of sites and one plan: every index that torch's bags need, in a few arrays.

The pairs of a plan are its (row, program) uses in order of rows. At a site each pair has as many samples as its program
has ranks there. All sites where the programs have the same ranks share one Profile, so a new membership costs little
more than the addresses of A.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.kernels.plan import Segment
from onebase.kernels.tables import ProgramTables, Use

Ints = NDArray[np.int64]
Rows = slice | Tensor  # a run of rows, or their int64 indices


@dataclass(frozen=True, slots=True)
class Profile:
    """Samples of one site. pair: of each sample; rank: its number in its program; rows: the bags, in order.

    columns: where its row of B lies. offsets: the first sample of each bag.
    """

    pair: Ints
    rank: Ints
    bags: Ints
    rows: Rows
    columns: Tensor
    offsets: Tensor


@dataclass(frozen=True, slots=True)
class Member:
    """One site of a group. samples: its part of the group's. bias: what its rows get beside, or None."""

    samples: slice
    profile: Profile | None
    bias: tuple[Rows, Tensor] | None


@dataclass(frozen=True, slots=True)
class BagStep:
    """One group of sites. index: elements of the arena where rows of A start; scale: fp32 (fp64), None if all are 1."""

    index: Tensor | None
    bags: Tensor | None
    scale: Tensor | None
    members: Mapping[int, Member]


@dataclass(frozen=True, slots=True)
class Pairs:
    """The (row, segment) pairs of a plan in order of rows, and what the programs of its segments have at every site.

    rows, segments: [pairs]. entries: [segments, sites, FIELDS]. columns: [segments], the first column of each program.
    """

    rows: Ints
    segments: Ints
    entries: Ints
    columns: Ints

    @classmethod
    def of(cls, segments: Sequence[Segment], starts: Mapping[int, int], tables: ProgramTables) -> Pairs:
        rows = np.concatenate([np.arange(segment.start, segment.stop) for segment in segments])
        numbers = np.repeat(np.arange(len(segments)), [segment.length for segment in segments])
        order = np.argsort(rows, kind="stable")
        entries = tables.device_table.numpy()[[tables.row(segment.handle) for segment in segments]]  # a copy
        return cls(rows[order], numbers[order], entries, np.array([starts[segment.handle] for segment in segments]))


class Gathers:
    """The segments of a plan that go by gathers, and their steps by group, made when first asked for."""

    def __init__(self, segments: Sequence[Segment], starts: Mapping[int, int], tables: ProgramTables) -> None:
        """starts: the first column of each program; it must not move while this is used."""
        self.starts = starts
        self._segments = segments
        self._tables = tables
        self._handles = frozenset(starts)
        self._pairs = Pairs.of(segments, starts, tables)
        self._scales = _scales(segments, self._pairs)
        self._biased = frozenset(np.flatnonzero((self._pairs.entries[:, :, 2] >= 0).any(axis=0)).tolist())
        self._steps: dict[tuple[int, ...], BagStep] = {}
        self._profiles: dict[bytes, Profile] = {}
        self._shared: dict[Hashable, Tensor] = {}

    def step(self, group: tuple[int, ...]) -> BagStep:
        step = self._steps.get(group)
        if step is None:
            step = self._steps[group] = self._make(group)
        return step

    def _make(self, group: tuple[int, ...]) -> BagStep:
        self._tables.require_linear(group, self._handles)
        ranks = self._pairs.entries[:, group, 3]
        profiles = [self._profile(ranks[:, at]) if ranks[:, at].any() else None for at in range(len(group))]
        members, start = {}, 0
        for site, profile in zip(group, profiles, strict=True):
            stop = start + (0 if profile is None else len(profile.pair))
            members[site] = Member(slice(start, stop), profile, self._bias(site))
            start = stop
        if start == 0:
            return BagStep(None, None, None, members)
        index = [self._index(site, one) for site, one in zip(group, profiles, strict=True) if one is not None]
        return BagStep(
            torch.from_numpy(np.concatenate(index)),
            self._share(("bags", ranks.tobytes()), lambda: _joined([p.bags for p in profiles if p is not None])),
            self._scale(group, profiles, ranks),
            members,
        )

    def _index(self, site: int, profile: Profile) -> Ints:
        starts = self._pairs.entries[:, site, 0][self._pairs.segments]
        index: Ints = starts[profile.pair] + profile.rank * self._tables.sites[site].in_features
        return index

    def _scale(self, group: tuple[int, ...], profiles: Sequence[Profile | None], ranks: Ints) -> Tensor | None:
        scales = self._scales[:, group]
        if (scales[ranks > 0] == 1).all():
            return None
        wide = np.float64 if self._tables.buffer.dtype is torch.float64 else np.float32
        parts = [(scales[self._pairs.segments, at], one) for at, one in enumerate(profiles) if one is not None]
        key = ("scale", ranks.tobytes(), scales.tobytes())
        return self._share(key, lambda: _joined([scale[one.pair].astype(wide) for scale, one in parts]))

    def _profile(self, ranks: Ints) -> Profile:
        key = ranks.tobytes()
        if key not in self._profiles:
            self._profiles[key] = self._draw(ranks[self._pairs.segments])
        return self._profiles[key]

    def _draw(self, counts: Ints) -> Profile:
        """counts: samples of each pair."""
        ends = np.cumsum(counts)
        pair = np.repeat(np.arange(len(counts)), counts)
        rank = np.arange(len(pair)) - (ends - counts)[pair]
        kept = np.flatnonzero(counts)
        rows, first = np.unique(self._pairs.rows[kept], return_index=True)
        offsets = (ends - counts)[kept[first]]
        columns = self._pairs.columns[self._pairs.segments][pair] + rank
        return Profile(pair, rank, self._pairs.rows[pair], run_of(rows), _narrow(columns), _narrow(offsets))

    def _bias(self, site: int) -> tuple[Rows, Tensor] | None:
        """[rows, out_features] and the rows that get it."""
        if site not in self._biased:
            return None
        operands = self._tables.operands
        ops = [(segment, operands(segment.handle).get(site)) for segment in self._segments]
        uses = [Use(segment, op) for segment, op in ops if op is not None and op.add_out >= 0]
        rows = sorted({row for use in uses for row in range(use.segment.start, use.segment.stop)})
        wide = torch.float64 if self._tables.buffer.dtype is torch.float64 else torch.float32
        bias = torch.zeros((len(rows), self._tables.sites[site].out_features), dtype=wide)
        for segment, op in uses:
            first = rows.index(segment.start)
            bias[first : first + segment.length] += segment.scale * self._tables.add_out(site, op)
        return run_of(np.array(rows)), bias.to(self._tables.buffer.dtype)

    def _share(self, key: Hashable, build: Callable[[], Tensor]) -> Tensor:
        if key not in self._shared:
            self._shared[key] = build()
        return self._shared[key]


def _scales(segments: Sequence[Segment], pairs: Pairs) -> NDArray[np.float64]:
    """The segment's scale times its program's, by site: [segments, sites]."""
    scales: NDArray[np.float64] = pairs.entries.view(np.float64)[:, :, 4]
    return np.array([segment.scale for segment in segments])[:, None] * scales


def run_of(rows: Ints) -> Rows:
    """Sorted, distinct rows as a slice where they are a run."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


def _joined(parts: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _narrow(values: Ints) -> Tensor:
    """int32 is read faster."""
    return torch.from_numpy(values.astype(np.int32))
