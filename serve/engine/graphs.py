"""Decode steps as CUDA graphs: captured lazily, replayed over static buffers, with the eager forward as their twin.

A step of one token for each sequence, all of whose adapters lie in the kernels' tables, is padded to a bucket of rows
and replayed. What a graph was captured for bounds what it can do: the sites that kernels are launched at, the largest
rank, the adapters on one row. A step that no graph covers runs eagerly and is remembered; its graph is captured when
engine is idle, or between two steps once it was missed often.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onebase.kernels.fixed_plan import DoesNotFit, FixedPlan, class_of
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.sizes import next_power_of_2
from onebase.kernels.tables import ProgramTables
from onebase.kernels.tiles import num_parts
from onebase.kernels.touched import NOWHERE, Touched
from onebase.serve.engine.graph_inputs import StaticInputs
from onebase.serve.engine.graph_recorder import Recorder, Recording
from onebase.serve.engine.inputs import StepInputs

log = logging.getLogger("onebase.engine")

MOST_ROWS = 256  # of a graph: beyond, launches are hidden behind the work
MOST_GRAPHS = 96
MOST_BYTES = 1 << 30  # of device memory, over all graphs
_OFTEN = 32  # steps without a graph, after which a busy engine stops for one
_REMEMBERED = 256

Forward = Callable[[StepInputs], Tensor]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a step's adapters ask of a graph, nothing in a step of base rows.

    sites: where they act; rank: the class of the largest; layers: how many act on one row at most; parts: how many
    blocks their ranks have together, in classes as well: every replay launches so many, also where one rank is large.
    """

    sites: Touched = NOWHERE
    rank: int = 0
    layers: int = 0
    parts: int = 0

    def covers(self, other: Needs) -> bool:
        enough = self.rank >= other.rank and self.layers >= other.layers and self.parts >= other.parts
        return enough and self.sites.covers(other.sites)


Key = tuple[int, Needs]  # rows, and what for


@dataclass(frozen=True, slots=True)
class Room:
    """What every graph of an engine is made for. longest: tokens of a sequence; scratch: a page that nobody holds."""

    max_rows: int
    longest: int
    page_size: int
    scratch: int
    device: torch.device

    @property
    def max_pages(self) -> int:
        return -(-self.longest // self.page_size)


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    static: StaticInputs
    recording: Recording

    def run(self, step: StepInputs) -> Tensor:
        """Logits [rows of the step, vocabulary], in memory of their own: the next replay writes over the graph's."""
        self.static.fill(step)
        self.recording.replay()
        return self.recording.output[: len(step.ids)].clone()


class DecodeGraphs:
    """The graphs of one engine. Used by its thread, in inference mode."""

    def __init__(
        self,
        forward: Forward,
        recorder: Recorder,
        tables: ProgramTables,
        instructions: InstructionTable,
        room: Room,
    ) -> None:
        """forward: the eager one, which is captured."""
        self.replays = 0
        self._forward = forward
        self._recorder = recorder
        self._tables = tables
        self._instructions = instructions
        self._room = room
        self._graphs: OrderedDict[Key, Graph] = OrderedDict()  # the latest used last
        self._missed: Counter[Key] = Counter()
        self._refused: set[Needs] = set()  # what could not be captured

    def run(self, step: StepInputs) -> Tensor | None:
        """Logits of the step from a replay; None where it has to run eagerly."""
        needs = self._needs(step)
        rows = bucket(len(step.ids))
        if needs is None or rows > self._room.max_rows:
            return None
        key = self._find(rows, needs) or self._miss((rows, needs))
        if key is None:
            return None
        try:
            logits = self._graphs[key].run(step)
        except DoesNotFit as error:
            log.warning("a decode graph of %d rows is given up: %s", rows, error)
            del self._graphs[key]
            return None
        self._graphs.move_to_end(key)
        self.replays += 1
        return logits

    @property
    def is_pending(self) -> bool:
        """Whether ``capture_next`` has anything to do."""
        return next(self._open(), None) is not None

    def capture_next(self) -> None:
        """Capture what was missed most, else one that may be needed; when there is nothing better to do."""
        key = next(self._open(), None)
        if key is not None:
            self._capture(key)

    def _needs(self, step: StepInputs) -> Needs | None:
        """None where the step is more than decoding, or an instruction reads what no static buffer holds."""
        decodes = len(step.ids) == len(step.attention.query_lens) == len(step.logits_rows)
        plan = step.rows
        if not decodes or step.virtual is not None or plan is not step.logits:
            return None
        if plan is None:
            return Needs()
        touched, layers = self._tables.touched(plan), len(plan.layers)
        if self._instructions.touched(plan) or (touched.maps and layers > 1):
            return None
        rank, parts = self._tables.largest_rank(plan), num_parts(plan, self._tables)
        return Needs(replace(touched, maps=frozenset()), class_of(rank), layers, class_of(parts))

    def _find(self, rows: int, needs: Needs) -> Key | None:
        """The graph that does least beside what is needed."""
        for key in [key for key, graph in self._graphs.items() if graph.static.is_stale]:
            del self._graphs[key]
        found = [key for key in self._graphs if key[0] == rows and key[1].covers(needs)]
        return min(found, key=lambda key: _size(key[1]), default=None)

    def _miss(self, key: Key) -> Key | None:
        """Remember that a graph was missed; capture it now if that has become frequent."""
        if len(self._missed) >= _REMEMBERED and key not in self._missed:
            self._missed.clear()
        self._missed[key] += 1
        if self._missed[key] < _OFTEN or not self._may_capture(key):
            return None
        return key if self._capture(key) else None

    def _open(self) -> Iterator[Key]:
        """Graphs worth capturing, those that were missed first, then the base's of every size, the largest first."""
        base = [(rows, Needs()) for rows in reversed(buckets(self._room.max_rows))]
        for key in [key for key, _ in self._missed.most_common()] + base:
            if key not in self._graphs and self._may_capture(key) and len(self._graphs) < MOST_GRAPHS:
                yield key

    def _may_capture(self, key: Key) -> bool:
        return self._recorder.nbytes < MOST_BYTES and not {key[1], Needs()} & self._refused

    def _capture(self, key: Key) -> bool:
        """Whether it worked. What does not is never tried again: the eager forward serves it."""
        rows, needs = key
        self._missed.pop(key, None)
        static = self._static(rows, needs)
        try:
            recording = self._recorder.record(lambda: self._forward(static.inputs))
        except Exception as error:
            log.warning("decode steps of %d rows stay eager: %s: %s", rows, type(error).__name__, error)
            self._refused.add(needs)
            return False
        self._graphs[key] = Graph(static, recording)
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return True

    def _static(self, rows: int, needs: Needs) -> StaticInputs:
        fixed = None
        if needs != Needs():
            fixed = FixedPlan(
                self._tables,
                rows,
                max_tiles=rows,
                max_rank=needs.rank,
                num_layers=needs.layers,
                max_parts=needs.parts,
                sites=needs.sites,
            )
        room = self._room
        return StaticInputs(rows, room.max_pages, room.page_size, room.longest, room.scratch, room.device, fixed)


def _size(needs: Needs) -> tuple[int, ...]:
    """What a graph does in every replay, the dearest first."""
    return needs.sites.count, needs.parts, needs.rank, needs.layers


def bucket(rows: int) -> int:
    """The rows that a step is padded to: powers of two up to 8, then multiples of 8, from 64 on of 16."""
    if rows <= 8:
        return next_power_of_2(rows)
    grain = 8 if rows <= 64 else 16
    return -(-rows // grain) * grain


def buckets(most: int) -> list[int]:
    """All of them up to ``most`` rows."""
    return sorted({bucket(rows) for rows in range(1, most + 1) if bucket(rows) <= most})
