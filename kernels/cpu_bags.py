"""What the gather way does for one group of sites and one plan: every index that torch's bags need, in a few arrays.

The pairs of a plan are its (row, program) uses in order of rows. At a site each pair has as many samples as its program
has ranks there. All sites where the programs have the same ranks share one Profile, so a new membership costs little
more than the addresses of A.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.kernels.plan import Segment
from onebase.kernels.tables import ProgramTables, Use, wrong_operands

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
class Layout:
    """What groups of sites have in common where their programs have equal ranks and scales at sites of equal widths.

    profiles: by site of the group. slices: each site's samples. starts, steps: for each sample, which A it is of, and
    how many elements behind its start. bags: of each sample. scale: fp32 (fp64), None if all are 1.
    """

    profiles: tuple[Profile | None, ...]
    slices: tuple[slice, ...]
    starts: Ints
    steps: Ints
    bags: Tensor
    scale: Tensor | None


@dataclass(frozen=True, slots=True)
class Member:
    """One site of a group. samples: its part of the group's. bias: what its rows get beside, or None."""

    samples: slice
    profile: Profile | None
    bias: tuple[Rows, Tensor] | None


@dataclass(frozen=True, slots=True)
class BagStep:
    """One group of sites. index: elements of the arena where rows of A start. bags, scale: see Layout."""

    index: Tensor
    bags: Tensor
    scale: Tensor | None
    members: Mapping[int, Member]


@dataclass(frozen=True, slots=True)
class Pairs:
    """The (row, segment) pairs of a plan in order of rows. columns: [segments], the first column of each program."""

    rows: Ints
    segments: Ints
    columns: Ints

    @classmethod
    def of(cls, segments: Sequence[Segment], starts: Mapping[int, int]) -> Pairs:
        rows = np.concatenate([np.arange(segment.start, segment.stop) for segment in segments])
        numbers = np.repeat(np.arange(len(segments)), [segment.length for segment in segments])
        order = np.argsort(rows, kind="stable")
        return cls(rows[order], numbers[order], np.array([starts[segment.handle] for segment in segments]))


class Gathers:
    """The segments of a plan that go by gathers, and their steps by group, made when first asked for."""

    def __init__(self, segments: Sequence[Segment], starts: Mapping[int, int], tables: ProgramTables) -> None:
        """starts: the first column of each program; it must not move while this is used."""
        self.starts = starts
        self._segments = segments
        self._tables = tables
        self._tokens = tables.token_sites(starts)
        self._pairs = Pairs.of(segments, starts)
        entries = tables.device_table.numpy()[[tables.row(segment.handle) for segment in segments]]
        self._a, self._ranks = _by_site(entries[:, :, 0]), _by_site(entries[:, :, 3])
        weights = np.array([segment.scale for segment in segments])
        self._scales = _by_site(entries.view(np.float64)[:, :, 4]) * weights
        self._biased = frozenset(np.flatnonzero((entries[:, :, 2] >= 0).any(axis=0)).tolist())
        self._kinds = [(r.tobytes(), s.tobytes()) for r, s in zip(self._ranks, self._scales, strict=True)]
        self._steps: dict[tuple[int, ...], BagStep] = {}
        self._layouts: dict[Hashable, Layout] = {}
        self._profiles: dict[bytes, Profile] = {}

    def step(self, group: tuple[int, ...]) -> BagStep:
        """Raises ValueError where one of the programs has an embedding's operands at one of the sites."""
        step = self._steps.get(group)
        if step is None:
            step = self._steps[group] = self._make(group)
        return step

    def _make(self, group: tuple[int, ...]) -> BagStep:
        if not self._tokens.isdisjoint(group):
            raise wrong_operands(min(self._tokens.intersection(group)))
        width = self._tables.sites[group[0]].in_features
        key = (width, *(self._kinds[site] for site in group))
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = self._lay_out(group, width)
        members = {
            site: Member(samples, profile, self._bias(site))
            for site, samples, profile in zip(group, layout.slices, layout.profiles, strict=True)
        }
        index = self._a[list(group)].ravel()[layout.starts] + layout.steps
        return BagStep(torch.from_numpy(index), layout.bags, layout.scale, members)

    def _lay_out(self, group: tuple[int, ...], width: int) -> Layout:
        profiles = tuple(self._profile(site) for site in group)
        used = [(at, one) for at, one in enumerate(profiles) if one is not None]
        ends = np.cumsum([0 if one is None else len(one.pair) for one in profiles]).tolist()
        slices = tuple(slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False))
        segments = [at * len(self._segments) + self._pairs.segments[one.pair] for at, one in used]
        starts = _joined(segments)
        scale = self._scales[list(group)].ravel()[starts]
        wide = np.float64 if self._tables.buffer.dtype is torch.float64 else np.float32
        return Layout(
            profiles,
            slices,
            starts,
            _joined([one.rank for _, one in used]) * width,
            torch.from_numpy(_joined([one.bags for _, one in used])),
            None if (scale == 1).all() else torch.from_numpy(scale.astype(wide)),
        )

    def _profile(self, site: int) -> Profile | None:
        """None where no program has a rank."""
        ranks = self._ranks[site]
        if not ranks.any():
            return None
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


def run_of(rows: Ints) -> Rows:
    """Sorted, distinct rows as a slice where they are a run."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


def _by_site(values: NDArray[Any]) -> NDArray[Any]:
    """[segments, sites] as contiguous [sites, segments]."""
    return np.ascontiguousarray(values.T)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _narrow(values: Ints) -> Tensor:
    """int32 is read faster."""
    return torch.from_numpy(values.astype(np.int32))
